"""TRL's online trainers on the paged engine: rollouts from the weights being trained, in the trainer's own process.

    from hf_paged.integrations.trl import PagedGRPOTrainer

    trainer = PagedGRPOTrainer(model=..., reward_funcs=..., train_dataset=..., paged=EngineConfig(exact=True))

With `exact=True` the log-probabilities that the loss sees are, bit for bit, those of the tokens when they were sampled, and
the importance ratio of a policy's first update is exactly 1. Needs `pip install hf_paged[trl]`.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from trl import GRPOTrainer, RLOOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import entropy_from_logits

from ..base.config import EngineConfig
from ..base.errors import InvalidArgument, UnsupportedOption
from ..base.sampling_params import SamplingParams
from ..hf.rollout import Rollout
from ..runtime.logprobs import chosen_logprobs

# of TRL's `generation_kwargs`: transformers' name -> ours
_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
}
_SEEDS = 2**31


class PagedRollouts:
    """Mixin for GRPOTrainer and RLOOTrainer, or a subclass of theirs; it stands before them.

    Args:
        paged: an EngineConfig for the policy's engine; default EngineConfig().

    Raises InvalidArgument for options of the trainer that name another way to generate, UnsupportedOption for
    `generation_kwargs` that the engine does not have.

    Attributes:
        rollout: see `hf_paged.rollout`.
    """

    def __init__(self, *args, paged: EngineConfig | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        for option in ("use_vllm", "use_transformers_continuous_batching"):
            if getattr(self.args, option, False):
                raise InvalidArgument(f"{option}: rollouts are hf_paged's here; leave it out")
        if getattr(self, "rollout_func", None) is not None:
            raise InvalidArgument("rollout_func: rollouts are hf_paged's here; leave it out")
        self._sampling = self._sampling_options()
        self._policy = self.accelerator.unwrap_model(self.model)
        self.rollout = Rollout(self._policy, paged or EngineConfig(), tokenizer=self.processing_class)

    def _sampling_options(self) -> dict:
        args = self.args
        options = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
        options["max_new_tokens"] = args.max_completion_length
        options |= args.generation_kwargs or {}
        unknown = sorted(set(options) - set(_NAMES))
        if unknown:
            raise UnsupportedOption(f"generation_kwargs: {unknown[0]} is not one of {', '.join(sorted(_NAMES))}")
        return {_NAMES[name]: value for name, value in options.items() if value is not None}

    def _generate_single_turn(self, prompt_ids, images, *args, **kwargs):
        if images is not None:
            raise UnsupportedOption("images: rollouts of vision-language models are not supported")
        seeds = torch.randint(_SEEDS, (len(prompt_ids),)).tolist()  # of torch's generator, as the trainer's seed set it
        common = dict(self._sampling, logprobs=0, stop_token_ids=self.eos_token_ids, ignore_eos=True)
        params = [SamplingParams(**common, seed=seed, detokenize="stop" in common) for seed in seeds]
        with self._gathered():
            outputs = self.rollout.generate([list(ids) for ids in prompt_ids], params)
        completions = [output.outputs[0] for output in outputs]
        token_ids = [completion.token_ids for completion in completions]
        if isinstance(self, RLOOTrainer):
            return token_ids
        if not self._raw:  # TRL wants them of the distribution that was sampled from, the engine reports the model's
            return token_ids, None
        logprobs = [
            [entry[token].logprob for entry, token in zip(completion.logprobs, completion.token_ids)]
            for completion in completions
        ]
        return token_ids, logprobs

    @property
    def _raw(self) -> bool:
        """Whether tokens are sampled from the model's own distribution."""
        plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        return all(self._sampling.get(name, value) in (value, None) for name, value in plain.items())

    def _gathered(self):
        """Weights that are spread over processes are here for the time of a rollout."""
        if self.accelerator.num_processes == 1:
            return nullcontext()
        return unwrap_model_for_generation(
            self.model_wrapped, self.accelerator, gather_deepspeed3_params=self.args.ds3_gather_for_generation
        )

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False,
        compute_aux_loss=False, **kwargs,
    ):  # fmt: skip
        if not self.rollout.exact or self.accelerator.unwrap_model(model) is not self._policy:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss, **kwargs
            )
        options = {"output_router_logits": True} if compute_aux_loss else {}
        parts, aux_losses = [], []
        for ids, mask in zip(*(tensor.split(batch_size or len(input_ids)) for tensor in (input_ids, attention_mask))):
            output = model(ids, attention_mask=mask, logits_to_keep=logits_to_keep + 1, use_cache=False, **options)
            parts.append(self._scores(output.logits[:, :-1], ids[:, -logits_to_keep:], mask[:, -logits_to_keep:], compute_entropy))
            aux_losses.append(output.aux_loss if compute_aux_loss else None)
        logps, entropies = (None if parts[0][i] is None else torch.cat([part[i] for part in parts]) for i in range(2))
        return logps, entropies, torch.stack(aux_losses).mean() if compute_aux_loss else None

    def _scores(self, logits, ids, mask, compute_entropy: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(log-probabilities [B, L] as the engine computes them, entropies [B, L]) of logits [B, L, V]; 0 for padding."""
        temperature = self._sampling["temperature"]
        logps = chosen_logprobs(logits.flatten(0, 1), ids.flatten(), temperature).view(ids.shape)
        entropies = None
        if compute_entropy:
            with torch.no_grad():
                entropies = entropy_from_logits(logits.float() / temperature).masked_fill(mask == 0, 0.0)
        return logps.masked_fill(mask == 0, 0.0), entropies


class PagedGRPOTrainer(PagedRollouts, GRPOTrainer):
    """trl.GRPOTrainer with `paged=EngineConfig(...)`."""


class PagedRLOOTrainer(PagedRollouts, RLOOTrainer):
    """trl.RLOOTrainer with `paged=EngineConfig(...)`."""
