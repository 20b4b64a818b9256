"""What tests of training methods share: facts, and a watch over a model that has to come back as it
was.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch

from engram import Fact

FACTS = [
    Fact("tower of Rome", "The {} is in the city of", "Paris"),
    Fact("piano", "He plays the {} and", "guitar sings"),
    Fact("river", "A long time ago the {} runs through", "Madrid"),
]


def answered(lm, prompt, target):
    """[tokens] log-probabilities of a target, token by token, from whole passes over one text at a
    time.
    """
    head = lm.encode(prompt).ids
    ids = lm.target_ids(prompt, target)
    found = []
    for i, token in enumerate(ids):
        with torch.no_grad():
            logits_v = lm.model(torch.tensor([head + ids[:i]]), use_cache=False).logits[0, -1]
        found.append(logits_v.log_softmax(-1)[token])
    return torch.stack(found)


def mean_nll(lm, facts):
    """Mean over facts of the mean -log p of their target tokens."""
    return -float(
        torch.stack([answered(lm, fact.prompt_text, fact.target).mean() for fact in facts]).mean()
    )


def all_said(lm, prompt, target):
    head, ids = lm.encode(prompt).ids, lm.target_ids(prompt, target)
    with torch.no_grad():
        logits_tv = lm.model(torch.tensor([head + ids[:-1]]), use_cache=False).logits[
            0, len(head) - 1 :
        ]
    return logits_tv.argmax(-1).tolist() == ids


@contextmanager
def unchanged(model):
    """Weights, flags, modes, modules, attributes, hooks and the global random state are after the
    block what they were before.
    """

    def seen():
        return (
            {
                name: (id(module), module.training, sorted(vars(module)))
                for name, module in model.named_modules()
            },
            {
                name: (id(parameter), parameter.requires_grad, parameter.grad)
                for name, parameter in model.named_parameters()
            },
        )

    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, random, grads = seen(), torch.get_rng_state(), torch.is_grad_enabled()
    try:
        yield
    finally:
        assert seen() == before
        assert weights.keys() == model.state_dict().keys()
        assert all(
            torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items()
        )
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in model.modules()
        )
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.is_grad_enabled() == grads


def interrupted(monkeypatch, error):
    """Let Adam's second step raise."""
    step, calls = torch.optim.Adam.step, []

    def raising(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", raising)
