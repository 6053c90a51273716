"""The pipeline for images and text: transformers' ImageTextToTextPipeline, its prompts decoded together."""

from __future__ import annotations

from transformers.pipelines.image_text_to_text import ImageTextToTextPipeline

from .base import PagedPipeline


class PagedImageTextToTextPipeline(PagedPipeline, ImageTextToTextPipeline):
    """An ImageTextToTextPipeline whose prompts are decoded by hf_paged's engine, side by side.

    Arguments, calls and results are those of ImageTextToTextPipeline, and so are the tokens (when sampling: for a single
    prompt; several have the same distribution). A list of prompts goes to the engine as a whole, generators and datasets
    are read ahead, `progress=True` shows a progress bar, and `close`, or the end of a `with` block, unpatches the model: see
    PagedTextGenerationPipeline, whose `engine_config` and errors it has, too.
    """

    def __call__(self, images=None, text=None, **kwargs):
        """Answer the prompt(s), as ImageTextToTextPipeline does; with `progress=True` behind a progress bar."""
        self._ensure_patched()
        return super().__call__(images, text, **kwargs)
