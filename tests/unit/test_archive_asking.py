import asyncio

from stormline.models.prompts import VideoAnswer, VideoPrompt
from stormline.pipeline.archive.asking import AskTogether


async def asked(texts, n_together, wait_s=3600.0):
    """Return what is asked and what is answered before the first one's time is over."""
    seen = []

    async def ask(prompt):
        seen.append(prompt.text)
        return VideoAnswer(prompt.text.upper(), 1, 0, 1, "stop")

    together = AskTogether(ask, n_together, wait_s)
    waiting = [asyncio.ensure_future(together(VideoPrompt(text))) for text in texts]
    if not wait_s:
        await asyncio.gather(*waiting)
    for _ in range(10):  # turns of the loop: enough for whatever need not wait
        await asyncio.sleep(0)
    answers = [task.result().text for task in waiting if task.done()]
    for task in waiting:
        task.cancel()
    return seen, answers


def test_questions_when_enough_are_there_then_go_together_and_the_rest_is_held():
    seen, answers = asyncio.run(asked(["a", "b", "c", "d", "e"], n_together=2))

    assert sorted(seen) == ["a", "b", "c", "d"]
    assert answers == ["A", "B", "C", "D"]


def test_questions_when_their_time_is_over_then_go_though_they_are_few():
    seen, answers = asyncio.run(asked(["a", "b", "c"], n_together=8, wait_s=0.0))

    assert (seen, answers) == (["a", "b", "c"], ["A", "B", "C"])
