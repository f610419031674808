"""Encode the prompts of a plan and make the text conditions of its generated spans."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from skyloom.generate.executor import DeterministicExecutor
from skyloom.generate.plan import Plan
from skyloom.models.base import (
    TextCondition,
    TextContext,
    TextEncoder,
    Transformer,
    prepare_prompt,
)

Texts = Mapping[str, Sequence[TextCondition]]
"""By prompt: its condition and, with guidance, that of the negative prompt."""


def encode_prompts(
    plan: Plan, text_encoder: TextEncoder, executor: DeterministicExecutor
) -> TextContext:
    """Encode all prompts and, with guidance, as the last row, the negative prompt."""
    rows = _prompts(plan)
    if plan.guidance_scale != 1.0:
        rows.append(plan.request.negative_prompt)
    return executor.run_one(partial(text_encoder.encode, rows))


def text_conditions(
    plan: Plan, context: TextContext, transformer: Transformer, executor: DeterministicExecutor
) -> Texts:
    """The condition of each prompt and, with guidance, of the negative prompt."""
    prompts = _prompts(plan)
    texts: dict[str, list[TextCondition]] = {}
    for row, prompt in enumerate(prompts):
        chosen = [row] if plan.guidance_scale == 1.0 else [row, len(prompts)]
        texts[prompt] = [
            executor.run_one(partial(prepare_prompt, context, one, transformer)) for one in chosen
        ]
    return texts


def truncations(plan: Plan, context: TextContext) -> Iterator[str]:
    """Yield a sentence for the user about each prompt that is too long."""
    prompts = _prompts(plan)
    rows = {prompt: row for row, prompt in enumerate(prompts)}
    for number, span in enumerate(plan.timeline.generated_spans, start=1):
        if plan.request.cards or number == 1:
            name = f"The prompt of card {number}" if plan.request.cards else "The prompt"
            yield from _truncation(name, context, rows[span.prompt])
    if plan.guidance_scale != 1.0:
        yield from _truncation("The negative prompt", context, len(prompts))


def _truncation(name: str, context: TextContext, row: int) -> Iterator[str]:
    """Yield the sentence about a prompt whose end was dropped, with the first dropped words."""
    count = context.truncated[row]
    if count:
        text = context.truncated_text[row] if context.truncated_text else ""
        words = f', from "{text}" on' if text else ""
        yield f"{name} is too long: its last {count} tokens were ignored{words}."


def _prompts(plan: Plan) -> list[str]:
    """The prompts of all generated spans, each once."""
    return list(dict.fromkeys(span.prompt for run in plan.runs for span in run.spans))
