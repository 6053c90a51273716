"""transformers' own processors around a tiny tokenizer, and models to go with them."""

from __future__ import annotations

import contextlib

import transformers
from tiny_configs import FAMILIES
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

VOCABULARY = 300
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ image }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SIDE = dict(height=8, width=8)


def _image_processor(kind: str, **options):
    """The one that needs Pillow only."""
    name = kind + "ImageProcessorPil"
    return getattr(transformers, name if hasattr(transformers, name) else kind + "ImageProcessor")(**options)


def tiny_processor(label: str):
    """(processor, its placeholder's token id, the text that stands for an image) of a family."""
    shown, make, *special = PROCESSORS[label]
    names = dict(zip(("image_token", "boi_token", "eoi_token"), special)) if label == "gemma3" else {}
    plain = tiny_tokenizer(VOCABULARY)
    tokenizer = type(plain)(
        tokenizer_object=plain.backend_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens=names or special,
    )
    processor = make(tokenizer)
    processor.chat_template = TEMPLATE.replace("{{ image }}", shown)
    return processor, tokenizer.convert_tokens_to_ids(special[0]), shown


def _llava(tokenizer):
    images = _image_processor("CLIP", size=dict(shortest_edge=8), crop_size=SIDE)
    return transformers.LlavaProcessor(images, tokenizer, **STRATEGY)


def _llava_next(tokenizer):
    options = dict(size=dict(shortest_edge=8), crop_size=SIDE, image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]])
    return transformers.LlavaNextProcessor(_image_processor("LlavaNext", **options), tokenizer, **STRATEGY)


def _idefics3(tokenizer):
    images = _image_processor("Idefics3", size=dict(longest_edge=16), max_image_size=dict(longest_edge=8))
    return transformers.Idefics3Processor(images, tokenizer, image_seq_len=4)


def _gemma3(tokenizer):
    return transformers.Gemma3Processor(_image_processor("Gemma3", size=SIDE), tokenizer, image_seq_length=4)


class StillQwen2VLProcessor(transformers.Qwen2VLProcessor):
    """Without the part for videos, which needs torchvision."""

    def __init__(self, image_processor, tokenizer):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        transformers.ProcessorMixin.__init__(self, image_processor, tokenizer)


def _qwen2_vl(tokenizer):
    images = _image_processor("Qwen2VL", patch_size=4, size=dict(shortest_edge=64, longest_edge=400))
    return StillQwen2VLProcessor(images, tokenizer)


STRATEGY = dict(patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1)
PLACES = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
# the text for an image, how the processor is made, and its special tokens, the placeholder first
PROCESSORS = {
    "llava": ("<image>", _llava, "<image>"),
    "llava_next": ("<image>", _llava_next, "<image>"),
    "idefics3": (
        "<image>",
        _idefics3,
        *("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *PLACES),
    ),
    "qwen2_vl": (
        "<|vision_start|><|image_pad|><|vision_end|>",
        _qwen2_vl,
        *("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    ),
    "gemma3": ("<start_of_image>", _gemma3, "<image_soft_token>", "<start_of_image>", "<end_of_image>"),
}


def available() -> list[str]:
    """Those whose image processor this transformers has without torchvision."""
    found = []
    for label in PROCESSORS:
        with contextlib.suppress(ImportError):
            tiny_processor(label)
            found.append(label)
    return found


def tiny_pair(label: str):
    """(model, processor, the text that stands for an image)."""
    processor, token_id, shown = tiny_processor(label)
    name = "image_token_index" if label.startswith("llava") else "image_token_id"
    text = dict(FAMILIES[label][1]["text_config"], vocab_size=len(processor.tokenizer))
    return tiny_model(label, text_config=text, **{name: token_id}), processor, shown
