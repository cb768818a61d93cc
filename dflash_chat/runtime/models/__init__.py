"""One file per architecture; the file name is the checkpoint's `model_type`.

Each has `Config.from_hf(raw)`, `Target`, and `IGNORED`, the beginnings of tensor names that a
checkpoint may hold for something else than text.
"""

SAME_AS = {  # model_type -> the file that serves it, where their names differ
    "gemma4_text": "gemma4",
    "gemma4_unified": "gemma4",
    "gemma4_unified_text": "gemma4",
}
