"""The modality `policies`: Decision Transformers, measured by their returns in environments of gymnasium."""
