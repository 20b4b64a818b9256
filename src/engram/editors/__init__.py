"""Methods that rewrite facts: closed-form, trained, or in context; `methods` is their table."""
