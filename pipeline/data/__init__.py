"""Reviews and the prompts cut from them. Knows nothing of models beyond a tokenizer."""
