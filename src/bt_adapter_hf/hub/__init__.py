"""The Hugging Face Hub: pushing, cards, access with retries, checked weights, code for `trust_remote_code`."""
