"""The same shapes and weights in this package's runtime and in others, measured side by side."""
