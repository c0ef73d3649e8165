"""The modality `custom`: models of any kind, measured by the user's own function or command."""
