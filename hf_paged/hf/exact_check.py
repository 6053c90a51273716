"""Whether a model can be exact, and how its forwards get their gradient: found out when it is patched."""

from __future__ import annotations

from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor, nn

from ..base.config import EngineConfig
from ..base.errors import UnsupportedModel, UnsupportedOption
from ..core.request import Request
from ..engine.build import build, build_runner
from .exact import Forwards
from .fusion.torch_ops import scope_torch_ops
from .selfcheck import Observed, scratch_config
from .swap import evaluating

_DTYPES = (torch.float32, torch.bfloat16)
_BUDGETS = (5, 16)  # tokens of a step, for the check
# By how much of its length a gradient may be off that of the model's own forward: what rounding explains. Some are only
# that, such as those of biases of keys: of the length that half of them have, then.
_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.3}


def check_exact(adapter, observed: Observed, config: EngineConfig) -> str | None:
    """Raise UnsupportedModel unless the logits of a prompt have the same bits computed at once, alone, and in steps of
    various lengths beside others and token by token.

    Returns why the forward that gives the logits cannot give their gradient; None if it does.
    """
    if adapter.team is not None:
        raise UnsupportedOption("exact: the sums of a sharded model's ranks depend on the batch")
    if adapter.dtype not in _DTYPES:
        raise UnsupportedOption(f"exact: float32 and bfloat16 are exact, not {adapter.dtype}")
    if not adapter.generates:
        raise UnsupportedOption(f"exact: {adapter.name} does not generate")
    if adapter.states:
        raise UnsupportedOption(f"exact: layers of {adapter.name} keep a state, which goes on from a prompt's chunks")
    tokens = observed.ids[0].tolist()
    adapter.torch_ops.noting = True
    whole = _logits(adapter, config, [tokens], len(tokens))[0]
    adapter.torch_ops.noting = False
    if adapter.torch_ops.others:
        raise UnsupportedModel(
            f"exact: {adapter.name} calls {', '.join(sorted(adapter.torch_ops.others))}, whose results depend on the batch"
        )
    adapter.runs_under_torch_ops = not scope_torch_ops(adapter.torch_ops, adapter.module, adapter.fusions)
    for budget in _BUDGETS:
        prompts = [tokens, tokens[: max(1, len(tokens) // 2)], tokens[: max(1, len(tokens) - 3)]]
        for mine in _logits(adapter, config, prompts, budget):
            if not torch.equal(mine, whole[: len(mine)]):
                raise UnsupportedModel(
                    f"exact: a token's logits of {adapter.name} depend on what is computed beside it"
                )
    return _why_no_gradient(adapter, config, tokens, whole)


def _logits(adapter, config: EngineConfig, prompts: list[list[int]], budget: int) -> list[Tensor]:
    """Logits [L, V] of every position of every prompt, in steps of at most `budget` tokens together, their last tokens
    one by one."""
    longest = max(map(len, prompts))
    scratch = scratch_config(adapter, config, max_batch_tokens=max(budget, len(prompts)), max_num_seqs=len(prompts))
    scratch = scratch.replace(kv_cache_memory=scratch.kv_cache_memory * len(prompts), kv_dtype=config.kv_dtype)
    cache, scheduler = build(adapter, scratch, max_model_len=longest + 1)
    runner = build_runner(adapter, scratch, cache, scheduler)
    singles = 1 if budget >= longest or scheduler.whole_prompts else 3
    given = [tokens[: max(1, len(tokens) - singles + 1)] for tokens in prompts]
    for number, tokens in enumerate(given):
        left = len(prompts[number]) - len(tokens) + 1
        scheduler.add(Request(request_id=str(number), prompt_token_ids=tokens, max_tokens=left))
    parts: dict[int, list[Tensor]] = {}
    try:
        while (plan := scheduler.schedule()) is not None:
            logits = runner.forward(runner.prepare(plan, rows=range(plan.num_tokens)))
            ends = {}
            for seq_id, begin, mine in zip(plan.seq_ids, plan.num_context, logits.split(plan.num_new)):
                parts.setdefault(seq_id, []).append(mine.clone())
                ends[seq_id] = begin + len(mine)
            longer = prompts[0] + prompts[0]  # all of them begin alike
            scheduler.commit(plan, {seq_id: [longer[ends[seq_id]]] for _, seq_id in plan.samples})
    finally:
        runner.release()
    return [torch.cat(parts[seq_id]) for seq_id in sorted(parts)]


# -- gradients


def _why_no_gradient(adapter, config: EngineConfig, tokens: list[int], whole: Tensor) -> str | None:
    """Why forwards on pages do not have the gradients that the model's own have, to rounding; None if they do.

    Compared are which parameters are reached, and the gradients of vectors among them and of the embeddings.
    """
    model = adapter.module
    weights = torch.rand(whole.shape, generator=torch.Generator().manual_seed(0)).to(whole)

    def own() -> Tensor:
        logits = model(torch.tensor([tokens], device=adapter.device), use_cache=False).logits[0]
        return (logits * weights).sum()

    def on_pages() -> Tensor:
        ((_, logits),) = Forwards(adapter, config).run([tokens], [len(tokens)])
        if not torch.equal(logits, whole):
            raise UnsupportedModel(f"exact: logits of {adapter.name} have other bits where their gradient is wanted")
        return (logits * weights).sum()

    try:
        with evaluating(model), torch.enable_grad(), _all_trained(model):
            expected, reached = _gradients(model, own)
            actual, mine = _gradients(model, on_pages)
    except RuntimeError as error:
        return f"it cannot be differentiated: {error}"
    if missed := [name for name in reached if name not in mine]:
        return f"the gradient does not reach {missed[0]}"
    lengths = {name: float(gradient.float().norm()) for name, gradient in expected.items()}
    usual = median(lengths.values())
    for name, gradient in expected.items():
        off = float((actual[name] - gradient).float().norm()) / max(lengths[name], usual, 1e-30) if name in actual else 1.0
        if not off <= _LIMITS[adapter.dtype]:
            return f"the gradient of {name} is off by {off:.1g} of its length"
    return None


@contextmanager
def _all_trained(model: nn.Module):
    """While inside, every parameter that can requires a gradient."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad and not p.is_inference()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _gradients(model: nn.Module, run) -> tuple[dict[str, Tensor], set[str]]:
    """(gradients of embeddings and vectors by name, names of all parameters that the result of `run` depends on)."""
    embedded: list[Tensor] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, output: embedded.append(output))
    try:
        result = run()
    finally:
        handle.remove()
    places = _leaves(result)
    parameters = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in places}
    vectors = {name: parameter for name, parameter in parameters.items() if parameter.dim() == 1}
    gradients = torch.autograd.grad(result, [*embedded, *vectors.values()], allow_unused=True)
    rows = torch.cat([gradient.flatten(0, -2) for gradient in gradients[: len(embedded)]])
    found = zip(vectors, gradients[len(embedded) :])
    return {"its embeddings": rows, **{name: g for name, g in found if g is not None}}, set(parameters)


def _leaves(result: Tensor) -> set[int]:
    """Ids of the tensors that autograd would accumulate a gradient in."""
    found, seen, nodes = set(), set(), [result.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes += [following for following, _ in node.next_functions]
    return found
