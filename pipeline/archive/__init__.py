"""Archives: the same lane, fed by files instead of Kafka."""
