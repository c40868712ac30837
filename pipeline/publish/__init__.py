"""Publishing video into Kafka: inputs, cutting into self-contained segments, and the producer.

`publisher.publish_source` is the way in. Importing this package loads neither FFmpeg nor Kafka.
"""
