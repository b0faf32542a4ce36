"""A whole app: answers questions about a picture, and remembers what it is told.

python examples/app.py BUNDLE photo.jpg
"""

import sys

import tinyalign_edge as ta

bundle, photo = sys.argv[1:]
with ta.load(bundle, threads="phone") as model:
    image = model.encode(photo)
    for line in map(str.strip, sys.stdin):
        if line.startswith("remember "):
            model.memory.add(image, line.removeprefix("remember "))
        elif line:
            for piece in model.stream(image, line):
                print(piece, end="", flush=True)
            print()
