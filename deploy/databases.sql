-- What Prefect and MLflow keep, each in a database of its own.
CREATE DATABASE prefect;
CREATE DATABASE mlflow;
CREATE DATABASE mlflow_auth;
