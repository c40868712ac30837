"""A folder of 200 and more videos, good and bad, archived in peace and under kills, and compared."""
