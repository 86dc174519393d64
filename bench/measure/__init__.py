"""What a model costs: FLOPs, memory, latency; counted, predicted and measured."""
