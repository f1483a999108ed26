"""Whether a target can run what students are made of: operator sets, one real conversion each, the culprit and what to use instead."""
