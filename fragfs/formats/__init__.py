"""How a file is cut: safetensors, gguf, zip and opaque bytes to labelled spans. Pure."""
