"""Where does the model store the fact? Causal tracing; reads the model, never changes it."""
