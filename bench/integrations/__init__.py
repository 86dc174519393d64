"""Our backbone in the registries of other libraries; nothing of ours imports it."""
