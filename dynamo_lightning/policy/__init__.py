"""The policy: loaded, laid out in micro-batches, read, given adapters and spread over processes."""
