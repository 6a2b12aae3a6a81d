"""Where audio comes from: files, raw bytes on stdin, microphones; all leave as mono at the model's rate."""
