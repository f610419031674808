"""Encode the prompts of a plan and make the text conditions of its generated spans."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from skyloom.generate.executor import DeterministicExecutor
from skyloom.generate.plan import Plan
from skyloom.models.base import TextCondition, TextContext, TextEncoder, Transformer

Texts = Mapping[str, Sequence[TextCondition]]
"""By prompt: its condition and, with guidance, that of the negative prompt."""


def encode_prompts(
    plan: Plan, text_encoder: TextEncoder, executor: DeterministicExecutor
) -> TextContext:
    """Encode all prompts and, as the last row, the negative prompt."""
    rows = [*_prompts(plan), plan.request.negative_prompt]
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
            executor.run_one(partial(_text_condition, context, one, transformer)) for one in chosen
        ]
    return texts


def truncations(plan: Plan, context: TextContext) -> Iterator[str]:
    """Yield a sentence for the user about each prompt that is too long."""
    dropped = dict(zip(_prompts(plan), context.truncated, strict=False))
    for number, span in enumerate(plan.timeline.generated_spans, start=1):
        count = dropped[span.prompt]
        if count and (plan.request.cards or number == 1):
            name = f"The prompt of card {number}" if plan.request.cards else "The prompt"
            yield f"{name} is too long: its last {count} tokens were ignored."
    negative = context.truncated[-1]
    if negative:
        yield f"The negative prompt is too long: its last {negative} tokens were ignored."


def _prompts(plan: Plan) -> list[str]:
    """The prompts of all generated spans, each once."""
    return list(dict.fromkeys(span.prompt for run in plan.runs for span in run.spans))


def _text_condition(context: TextContext, row: int, transformer: Transformer) -> TextCondition:
    """One row of a text context, without padding."""
    length = int(context.context_mask[row].sum())
    where = (transformer.device, transformer.dtype)
    tokens = context.context[row : row + 1, :length].to(*where)
    pooled = context.pooled[row : row + 1].to(*where)
    return transformer.prepare_text(tokens, None, pooled)
