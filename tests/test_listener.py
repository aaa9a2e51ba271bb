"""What ComfyUI says of one prompt, as watchers hear it."""

import msgspec

from comfyd.comfy import messages
from comfyd.listener import Listener
from comfyd.progress import Board
from tests.support.clock import HandClock


async def test_a_sentence_of_a_node_is_a_log_event() -> None:
    board = Board()
    listener = Listener("t", {"1": "SomeApiNode"}, frozenset(), board, HandClock())
    with board.watch("t") as watcher:
        listener(messages.ProgressText(prompt_id="p", node_id="1", text="queued at the partner"))
        event = await watcher.next(timeout=1)
    assert event is not None
    assert event.name == "log"
    assert msgspec.json.decode(event.data) == {"node_id": "1", "message": "queued at the partner"}
