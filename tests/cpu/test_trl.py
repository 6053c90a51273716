"""TRL's online trainers with rollouts of the paged engine."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer
from trl import GRPOConfig, RLOOConfig

from hf_paged import EngineConfig, InvalidArgument, UnsupportedOption
from hf_paged.integrations.trl import PagedGRPOTrainer, PagedRLOOTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of TRL, transformers and PEFT among themselves
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
VOCAB = 320


def even(completions, completion_ids, **kwargs):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def make(tmp_path, trainer, paged=None, *, peft_config=None, model=None, **options):
    torch.manual_seed(0)
    config = RLOOConfig if issubclass(trainer, PagedRLOOTrainer) else GRPOConfig
    if model is None:
        model = tiny_model("llama", vocab_size=VOCAB)
    model.generation_config.eos_token_id = 2
    args = config(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_completion_length=12,
        learning_rate=5e-3, report_to=[], use_cpu=True, save_strategy="no", logging_steps=1, seed=1, bf16=False, **{"max_steps": 3, **options},
    )  # fmt: skip
    dataset = Dataset.from_dict({"prompt": ["a b c d", "hello there", "one two three", "x"] * 4})
    return trainer(
        model=model, reward_funcs=even, args=args, train_dataset=dataset, processing_class=tiny_tokenizer(VOCAB),
        peft_config=peft_config, paged=paged,
    )  # fmt: skip


class Watching(PagedGRPOTrainer):
    """Notes what the loss compares."""

    def _compute_loss(self, model, inputs):
        seen = {name: inputs.get(name) for name in ("sampling_per_token_logps", "old_per_token_logps", "completion_mask")}
        self.__dict__.setdefault("seen", []).append(seen)
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if torch.is_grad_enabled():
            self.__dict__.setdefault("trained", []).append(result[0].detach().clone())
        return result


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_in_exact_mode_the_first_update_of_a_rollout_has_a_ratio_of_exactly_one(tmp_path, lora):
    peft_config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if lora else None
    paged = EngineConfig(exact=True, max_batch_tokens=32)
    # the second inner step sees weights that the first one changed
    trainer = make(tmp_path, Watching, paged, peft_config=peft_config, num_iterations=2, disable_dropout=True, max_steps=4)
    trainer.train()
    assert len(trainer.trained) == len(trainer.seen) == 4
    for step, (logps, seen) in enumerate(zip(trainer.trained, trainer.seen)):
        mask = seen["completion_mask"].bool()
        old, sampled = seen["old_per_token_logps"], seen["sampling_per_token_logps"]
        assert torch.equal(old[mask], sampled[mask]) and sampled[mask].max() < 0
        assert torch.equal(logps[mask], sampled[mask]) == (step % 2 == 0)
    trainer.rollout.close()


def test_rollouts_are_of_the_weights_as_they_are_and_end_as_the_trainer_says(tmp_path):
    trainer = make(tmp_path, PagedGRPOTrainer, temperature=0.9, top_p=0.95)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(history) == 3 and all(entry["completions/max_length"] <= 12 for entry in history)
    model, tokenizer = trainer.model, trainer.processing_class
    prompts = tokenizer(["a b c d", "x"])["input_ids"]
    ids, logprobs = trainer._generate_single_turn(prompts, None, {}, 1)
    assert logprobs is None  # of a distribution that top_p and the temperature changed
    assert all(2 not in tokens[:-1] for tokens in ids)  # nothing after the end
    trainer._sampling = {"temperature": 0.0, "max_tokens": 6}
    greedy, _ = trainer._generate_single_turn(prompts, None, {}, 1)
    trainer.rollout.close()
    for prompt, tokens in zip(prompts, greedy):
        expected = model.eval().generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :]
        assert tokens == expected.tolist()


def test_rloo_trains(tmp_path):
    trainer = make(tmp_path, PagedRLOOTrainer, EngineConfig(exact=True), beta=0.0)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters()))
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry)
    trainer.rollout.close()


@pytest.mark.parametrize(
    "options, error, named",
    [
        (dict(use_transformers_continuous_batching=True), InvalidArgument, "use_transformers_continuous_batching"),
        (dict(generation_kwargs={"num_beams": 2}), UnsupportedOption, "generation_kwargs: num_beams"),
    ],
)
def test_another_way_to_generate_is_refused_by_name(tmp_path, options, error, named):
    with pytest.raises(error, match=named):
        make(tmp_path, PagedGRPOTrainer, **options)
