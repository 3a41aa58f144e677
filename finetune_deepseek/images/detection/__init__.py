"""Object detection: boxes with a class each, read, varied with their images, learned, scored and drawn."""
