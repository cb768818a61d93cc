"""One file per architecture; the file name is the checkpoint's `model_type`."""
