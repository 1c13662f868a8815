"""What several test folders share: tolerances, poisoning, hard inputs, the golden files' reader."""
