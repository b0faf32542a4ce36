"""The demo: a small drawn world, towers pretrained on it in seconds, and pictures of what came out."""
