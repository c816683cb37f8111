"""The LM head's definition in dense logits and double precision, and random cases for both."""

import torch


INPUTS = ("hidden_states", "weight", "bias")


def make_case(num_rows=23, num_pairs=8, vocab=37, hidden=5, dtype=torch.float64, bias=True, ignored=1, seed=0, **head):
    """Arguments of `label_log_probs`: pairs in any order, one of equal labels, some rows without a label."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(vocab, (num_rows,), generator=generator)
    rows = torch.randperm(num_rows, generator=generator)
    first, second = rows[:num_pairs], rows[num_pairs : 2 * num_pairs]
    labels[second[:1]] = labels[first[:1]]
    labels[rows[num_rows - ignored :]] = -100
    return {
        "hidden_states": random(num_rows, hidden).requires_grad_(),
        "weight": (random(vocab, hidden) * 2 / hidden**0.5).requires_grad_(),
        "bias": random(vocab).requires_grad_() if bias else None,
        "labels": labels,
        "first": first,
        "second": second,
        "mix_weights": torch.rand(num_pairs, generator=generator),
        **head,
    }


def freeze(case):
    for name in ("weight", "bias"):
        if case[name] is not None:
            case[name].requires_grad_(False)
    return case


def double(case):
    """The same case in float64."""
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if name in INPUTS and value is not None
        else value
        for name, value in case.items()
    }


def dense_head(hidden_states, weight, bias, softcap=None, scale=1.0):
    logits = hidden_states @ weight.T
    logits = (logits if bias is None else logits + bias) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def dense_log_probs(hidden_states, weight, bias, labels, first, second, mix_weights, tile=None, **head):
    """The definition: mix hidden states, apply the head, cross-entropy against the mixed one-hot labels."""
    is_labelled = labels != -100
    logits = dense_head(hidden_states, weight, bias, **head)
    log_p = logits.log_softmax(-1)
    one_hot = torch.nn.functional.one_hot(labels.clamp(min=0), len(weight)).to(log_p.dtype)
    share = mix_weights.to(log_p.dtype)[:, None]
    mixed_log_p = dense_head(
        share * hidden_states[first] + (1 - share) * hidden_states[second], weight, bias, **head
    ).log_softmax(-1)
    mixed_labels = share * one_hot[first] + (1 - share) * one_hot[second]
    return (
        (one_hot * log_p).sum(-1) * is_labelled,
        -(log_p.exp() * log_p).sum(-1) * is_labelled,
        (logits.argmax(-1) == labels) & is_labelled,
        (mixed_labels * mixed_log_p).sum(-1),
    )


def gradients_of(function, case, upstream):
    """Outputs, and gradients of hidden states, weight and bias for gradients on `log_probs` and `mixed_log_probs`."""
    outputs = function(**case)
    inputs = [case[name] for name in INPUTS if case[name] is not None and case[name].requires_grad]
    used = [
        (output, g.to(output.dtype))
        for output, g in zip((outputs[0], outputs[3]), upstream, strict=True)
        if g is not None
    ]
    return outputs, torch.autograd.grad([output for output, _ in used], inputs, [g for _, g in used])


def random_upstream(case, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(case[name]), generator=generator, dtype=torch.float64) for name in ("labels", "first")]


def relative_error(values, reference):
    return ((values.double() - reference).norm() / reference.norm().clamp(min=1e-300)).item()
