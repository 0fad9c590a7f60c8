"""What was lost: measured, with the protocol that the number depends on."""
