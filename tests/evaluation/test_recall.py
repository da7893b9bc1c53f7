"""Questions hold their answers, and a model that looks them up has a perfect score."""

from types import SimpleNamespace

import pytest
import torch

from spattention.evaluation.recall import NEEDLE, ask, copying, needle, pairs, questions, recall

VOCABULARY = 50


class LooksUp:
    """Predicts what followed the latest earlier place where the last `suffix` tokens stood."""

    device = torch.device("cpu")

    def __init__(self, suffix, reach=10**9):
        self.suffix, self.reach = suffix, reach

    def eval(self):
        return self

    def __call__(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        for row, ids in enumerate(input_ids.tolist()):
            for i in range(self.suffix - 1, len(ids)):
                key = ids[i - self.suffix + 1 : i + 1]
                for j in range(i - 1, max(self.suffix - 2, i - self.reach), -1):
                    if ids[j - self.suffix + 1 : j + 1] == key:
                        logits[row, i, ids[j + 1]] = 20.0
                        break
        return SimpleNamespace(logits=logits)


def text(items, length):
    return torch.randint(0, VOCABULARY, (items, length), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(
    ("question", "suffix"),
    [
        (copying(VOCABULARY, 16, 8), 3),
        (pairs(VOCABULARY, 10, 8), 1),
        (needle(text(8, 64), VOCABULARY, 0.0), 3),
        (needle(text(8, 64), VOCABULARY, 0.7), 3),
        (needle(text(8, 64), VOCABULARY, 1.0), 3),
    ],
)
def test_looking_up_answers_every_question(question, suffix):
    found = ask(LooksUp(suffix), question, batch=3)
    assert found.accuracy.mean > 0.8  # the first tokens of a copy have no suffix yet
    assert not found.near_chance
    blind = ask(LooksUp(suffix, reach=0), question, batch=3)
    assert blind.accuracy.mean < 0.2
    assert blind.loss.mean == pytest.approx(torch.tensor(VOCABULARY * 1.0).log().item(), rel=0.01)
    assert blind.near_chance or blind.task == "pairs"


def test_what_lies_beyond_reach_is_not_found():
    near = ask(LooksUp(3, reach=20), copying(VOCABULARY, 16, 8))
    far = ask(LooksUp(3, reach=20), copying(VOCABULARY, 32, 8))
    assert near.accuracy.mean > 0.8 > 0.2 > far.accuracy.mean


def test_asked_tokens_are_the_answers():
    question = pairs(VOCABULARY, 5, 3)
    for ids, asked in zip(question.ids.tolist(), question.asked.tolist()):
        shown = dict(zip(ids[0:10:2], ids[1:10:2]))
        assert len({*ids[:10]}) == 10
        assert [k for k, a in enumerate(asked) if a] == [11, 13, 15, 17, 19]
        assert all(shown[ids[k - 1]] == ids[k] for k, a in enumerate(asked) if a)
    haystack = text(3, 70)
    for depth, place in ((0.0, 0), (0.5, 19), (1.0, 38)):
        question = needle(haystack, VOCABULARY, depth)
        assert question.ids.shape == (3, 70)
        found = question.ids[:, place : place + 2 * NEEDLE]
        assert torch.equal(found, question.ids[:, -2 * NEEDLE :])
        assert question.asked.sum(dim=1).tolist() == [NEEDLE] * 3
        assert torch.equal(question.ids[:, :place], haystack[:, :place])


def test_everything_that_fits_is_asked():
    asked = list(questions(VOCABULARY, 128, text(4, 128), items=4))
    assert {q.task for q in asked} == {"copying", "pairs", "needle"}
    assert [q.setting for q in asked if q.task == "copying"] == [8, 16, 32, 64]
    assert [q.setting for q in asked if q.task == "pairs"] == [4, 16]
    assert all(q.ids.shape[1] <= 128 and len(q.ids) == 4 for q in asked)
    seen = []
    scores = recall(LooksUp(1), asked[:2], tokens=40, on_score=seen.append)
    assert scores == seen
    assert scores[0] == ask(LooksUp(1), asked[0], batch=4)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: copying(VOCABULARY, 1, 3), "`distance` must be at least 2, got 1"),
        (lambda: pairs(VOCABULARY, 26, 3), "`count` must be at most half of 50 tokens, got 26"),
        (lambda: needle(text(2, 64), VOCABULARY, 1.5), r"`depth` must be from 0 to 1, got 1\.5"),
        (lambda: needle(text(2, 20), VOCABULARY, 0.5), "`length` must be at least 32, got 20"),
    ],
)
def test_wrong_arguments_raise(make, error):
    with pytest.raises(ValueError, match=error):
        make()
