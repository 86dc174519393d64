"""Words that the configuration and the command line share; needs no torch."""

METHODS = ("mask_rcnn", "retinanet")
LIBRARIES = ("torchvision", "detectron2", "auto")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
POSITIONS = ("absolute", "relative")
MODES = ("inference", "training")
SCOPES = ("backbone", "attention", "detector")
SWEPT = ("flops", "memory", "latency")
QUANTITIES = ("parameters", *SWEPT)
