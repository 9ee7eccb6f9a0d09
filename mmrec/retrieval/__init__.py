"""From an encoder to matches: embeddings, index, matcher, evaluation."""
