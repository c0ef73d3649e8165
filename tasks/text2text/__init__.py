"""The modality `text2text`: sequence-to-sequence models, measured by the texts that they write."""
