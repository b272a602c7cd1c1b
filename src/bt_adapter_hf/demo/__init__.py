"""The page of `bt-adapter demo`: what the models do, to be tried in a browser. Needs gradio, the extra `demo`."""
