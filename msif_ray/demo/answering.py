"""Does a model answer the demo's questions? Greedy decoding, batched."""

from collections.abc import Sequence
from itertools import groupby

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from msif_ray.demo.questions import Question


def answers_correctly(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> list[bool]:
    """For each question, whether greedy decoding gives exactly its completion followed by the EOS token.

    Greedy decoding gives a sequence exactly if each of its tokens is the most likely one after those before
    it, so one forward pass per batch decides. Prompt and completion are tokenised separately, as in training.
    """
    sequences = [question_tokens(tokenizer, question) for question in questions]
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index][0]))
    correct = [False] * len(sequences)
    model.eval()
    for _, group in groupby(order, key=lambda index: len(sequences[index][0])):
        indices = list(group)
        rows = [sequences[index][0] for index in indices]
        tokens = torch.tensor(rows, device=model.device)  # [questions, length]
        with torch.no_grad():
            greedy = model(tokens).logits[:, :-1].argmax(dim=-1)  # [questions, length - 1]
        for row, index in enumerate(indices):
            start = sequences[index][1]
            correct[index] = bool((greedy[row, start - 1 :] == tokens[row, start:]).all())
    return correct


def question_tokens(tokenizer: PreTrainedTokenizerBase, question: Question) -> tuple[list[int], int]:
    """Token ids of prompt, completion and EOS, and the index of the first completion token."""
    prompt = tokenizer(question["prompt"])["input_ids"]
    completion = tokenizer(question["completion"], add_special_tokens=False)["input_ids"]
    return [*prompt, *completion, tokenizer.eos_token_id], len(prompt)
