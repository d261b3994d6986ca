"""From image files to boxes in image pixels: sources, letterbox, network, decode and NMS, drawing."""
