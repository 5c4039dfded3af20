"""What a video may ask for before it is refused: bytes, time, frames, pixels, work.

Each limit is checked on what the file says before anything of that size is taken, and again on
what comes out of the decoder.
"""

from __future__ import annotations

FRAMES = 8
"""Frames of a video that a model is shown, unless a recipe says otherwise."""
MAX_SAMPLED = 256
"""Frames that may be asked for."""
MAX_FILE = 4 * 2**30
"""Bytes of a video's file, which is never in memory as a whole: four hours at 2 Mbit/s."""
MAX_SECONDS = 4 * 3600
"""Length."""
MAX_FRAMES = 1_000_000
"""Frames of a file; four hours at 60 a second are 864 000. Their places take 50 MB while the frames
are chosen."""
MAX_FRAME_PIXELS = 16_777_216
"""Pixels of a frame: 4K has 8 million."""
MAX_CLIP_PIXELS = 268_435_456
"""Pixels of the frames that are taken together, 3 bytes each: 32 of 4K."""
MAX_DECODED_PIXELS = 30_000_000_000
"""Pixels decoded on the way to the frames that are taken, each from the key frame before it: some
minutes."""
