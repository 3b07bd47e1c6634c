//! The client of a URL's object store, with credentials from the environment.

use std::{
    sync::{Arc, Once},
    time::Duration,
};

use object_store::{
    BackoffConfig, ClientOptions, ObjectStore, ObjectStoreScheme, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    azure::MicrosoftAzureBuilder,
    gcp::GoogleCloudStorageBuilder,
    http::HttpBuilder,
};
use url::Url;

use crate::remote::{aws_profile, network::Network, pace::Paced};

pub(crate) const NO_RETRY: RetryConfig = RetryConfig {
    max_retries: 0,
    retry_timeout: Duration::ZERO,
    backoff: BackoffConfig {
        init_backoff: Duration::ZERO,
        max_backoff: Duration::ZERO,
        base: 2.0,
    },
};

/// Opens the client of a store that can be written to, whose uploads keep to a pace. `None` for the
/// others.
pub(crate) fn open_paced(
    scheme: &ObjectStoreScheme,
    url: &Url,
    options: ClientOptions,
    retry: RetryConfig,
    paced: Paced,
) -> object_store::Result<Option<Arc<dyn ObjectStore>>> {
    let store: Arc<dyn ObjectStore> = match scheme {
        ObjectStoreScheme::AmazonS3 => {
            let builder = s3(url, options, retry)
                // Not all stores that speak S3 delete several objects at once.
                .with_config(AmazonS3ConfigKey::DisableBulkDelete, "true")
                .with_http_connector(paced);
            Arc::new(builder.build()?)
        }
        ObjectStoreScheme::GoogleCloudStorage => {
            let builder = gcs(url, options, retry).with_http_connector(paced);
            Arc::new(builder.build()?)
        }
        ObjectStoreScheme::MicrosoftAzure => {
            let builder = azure(url, options, retry).with_http_connector(paced);
            Arc::new(builder.build()?)
        }
        _ => return Ok(None),
    };
    Ok(Some(store))
}

pub(crate) fn open_store(
    scheme: &ObjectStoreScheme,
    url: &Url,
    options: ClientOptions,
    retry: RetryConfig,
) -> object_store::Result<Option<Arc<dyn ObjectStore>>> {
    let store: Arc<dyn ObjectStore> = match scheme {
        ObjectStoreScheme::AmazonS3 => Arc::new(s3(url, options, retry).build()?),
        ObjectStoreScheme::GoogleCloudStorage => Arc::new(gcs(url, options, retry).build()?),
        ObjectStoreScheme::MicrosoftAzure => Arc::new(azure(url, options, retry).build()?),
        // The key of an object holds the whole path of the URL.
        ObjectStoreScheme::Http => {
            let builder = HttpBuilder::new()
                .with_url(&url[..url::Position::BeforePath])
                .with_client_options(options)
                .with_retry(retry);
            Arc::new(builder.build()?)
        }
        _ => return Ok(None),
    };
    Ok(Some(store))
}

fn s3(url: &Url, options: ClientOptions, retry: RetryConfig) -> AmazonS3Builder {
    aws_profile::complete(AmazonS3Builder::from_env())
        .with_url(url.as_str())
        .with_client_options(options)
        .with_retry(retry)
}

fn gcs(url: &Url, options: ClientOptions, retry: RetryConfig) -> GoogleCloudStorageBuilder {
    GoogleCloudStorageBuilder::from_env()
        .with_url(url.as_str())
        .with_client_options(options)
        .with_retry(retry)
}

fn azure(url: &Url, options: ClientOptions, retry: RetryConfig) -> MicrosoftAzureBuilder {
    MicrosoftAzureBuilder::from_env()
        .with_url(url.as_str())
        .with_client_options(options)
        .with_retry(retry)
}

/// Options of a client. The time of a whole body has no limit: a large one on a slow line is fine
/// as long as bytes arrive.
pub(crate) fn options(url: &Url, network: &Network) -> ClientOptions {
    ClientOptions::new()
        .with_timeout_disabled()
        .with_connect_timeout(network.connect_timeout)
        .with_pool_max_idle_per_host(network.concurrency)
        .with_allow_http(url.scheme() == "http" || allows_http())
}

/// Whether a store without TLS is allowed: by an endpoint `http://...`, or by AWS_ALLOW_HTTP.
pub(super) fn allows_http() -> bool {
    let names = [
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_ENDPOINT",
        "GOOGLE_BASE_URL",
        "AZURE_STORAGE_ENDPOINT",
    ];
    let variables = names.into_iter().flat_map(std::env::var);
    let endpoint = variables.chain(aws_profile::endpoint()).next();
    endpoint.is_some_and(|endpoint| endpoint.starts_with("http://"))
        || std::env::var("AWS_ALLOW_HTTP").is_ok_and(|value| value == "true")
}

/// Selects the provider of TLS for this process.
pub fn install_tls() {
    static INSTALLED: Once = Once::new();
    // An error means that the program has installed another provider already, which works too.
    INSTALLED.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
}
