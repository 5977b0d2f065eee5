"""Where data come from: image files, arrays, vectors; and what turns them into what a model sees."""
