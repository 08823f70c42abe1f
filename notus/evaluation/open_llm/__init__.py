"""Tasks of EleutherAI's lm-eval, computed by this project's own forward pass: `--suite open-llm`."""
