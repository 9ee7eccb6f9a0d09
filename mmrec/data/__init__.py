"""Tables, media, shards, and the batches that training reads."""
