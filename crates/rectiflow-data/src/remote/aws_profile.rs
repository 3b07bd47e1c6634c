//! Profiles of the AWS command line, `~/.aws/credentials` and `~/.aws/config`: the usual place of
//! S3 keys, also for R2, MinIO and others. `object_store` reads only the environment, which takes
//! precedence here too.
//!
//! Keys, token, region and endpoint are read. Single sign-on, assumed roles and credential
//! processes are not supported: export their keys (`aws configure export-credentials --format
//! env`).

use std::{
    collections::HashMap,
    env, fs,
    path::{Path, PathBuf},
};

use object_store::aws::AmazonS3Builder;

/// Adds the settings of the profile that the environment lacks; id and secret only together.
pub(crate) fn complete(builder: AmazonS3Builder) -> AmazonS3Builder {
    let keys = [
        "AWS_ACCESS_KEY_ID",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_SKIP_SIGNATURE",
    ];
    let endpoints = ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"];
    let regions = ["AWS_REGION", "AWS_DEFAULT_REGION"];
    apply(
        builder,
        &profile(),
        keys.into_iter().any(is_set),
        endpoints.into_iter().any(is_set),
        regions.into_iter().any(is_set),
    )
}

fn is_set(variable: &str) -> bool {
    env::var_os(variable).is_some_and(|value| !value.is_empty())
}

/// The endpoint of the profile, if it has one.
pub(crate) fn endpoint() -> Option<String> {
    profile().get("endpoint_url").cloned()
}

type Profile = HashMap<String, String>;

fn apply(
    mut builder: AmazonS3Builder,
    profile: &Profile,
    has_keys: bool,
    has_endpoint: bool,
    has_region: bool,
) -> AmazonS3Builder {
    if !has_keys
        && let Some(id) = profile.get("aws_access_key_id")
        && let Some(secret) = profile.get("aws_secret_access_key")
    {
        builder = builder
            .with_access_key_id(id)
            .with_secret_access_key(secret);
        if let Some(token) = profile.get("aws_session_token") {
            builder = builder.with_token(token);
        }
    }
    if let Some(endpoint) = profile.get("endpoint_url")
        && !has_endpoint
    {
        builder = builder.with_endpoint(endpoint);
    }
    match profile.get("region") {
        Some(region) if !has_region => builder.with_region(region),
        _ => builder,
    }
}

/// The settings of the profile that AWS_PROFILE names, from both files.
fn profile() -> Profile {
    let name = env::var("AWS_PROFILE").unwrap_or_else(|_| "default".to_owned());
    let mut profile = read(&place("AWS_CONFIG_FILE", "config"), &name);
    let credentials = place("AWS_SHARED_CREDENTIALS_FILE", "credentials");
    profile.extend(read(&credentials, &name));
    profile
}

/// The path in `variable`, or that of `file` in `~/.aws`.
fn place(variable: &str, file: &str) -> PathBuf {
    match env::var_os(variable) {
        Some(path) => path.into(),
        None => {
            let home = env::var_os("HOME").unwrap_or_default();
            PathBuf::from(home).join(".aws").join(file)
        }
    }
}

/// The settings of a profile in a file. Empty if the file is missing or cannot be read.
fn read(path: &Path, name: &str) -> Profile {
    fs::read_to_string(path)
        .map(|text| parse(&text, name))
        .unwrap_or_default()
}

/// The settings of one section. In `config` the section is `[profile NAME]`, except for the
/// default. Indented lines are settings of single services and are skipped.
fn parse(text: &str, name: &str) -> Profile {
    let mut keys = Profile::new();
    let mut is_wanted = false;
    for line in text.lines() {
        if let Some(section) = section(line) {
            is_wanted = section.strip_prefix("profile ").map_or(section, str::trim) == name;
            continue;
        }
        let is_comment = line.starts_with(['#', ';', ' ', '\t']);
        if is_wanted
            && !is_comment
            && let Some((key, value)) = line.split_once('=')
        {
            keys.insert(key.trim().to_lowercase(), value.trim().to_owned());
        }
    }
    keys
}

/// The name in a line `[name]`.
fn section(line: &str) -> Option<&str> {
    let section = line.trim().strip_prefix('[')?.strip_suffix(']')?;
    Some(section.trim())
}

#[cfg(test)]
mod tests {
    use object_store::aws::AmazonS3ConfigKey as Key;

    use super::*;

    const CONFIG: &str = "[default]\nregion = eu-west-1\n\n\
                          [profile r2]\n# a comment = x\nregion=auto\n\
                          endpoint_url = https://account.example\ns3 =\n  \
                          addressing_style = path\n[services x]\n";
    const CREDENTIALS: &str = "[default]\naws_access_key_id=a\naws_secret_access_key=b\n\
                               [r2]\nAWS_ACCESS_KEY_ID = id\naws_secret_access_key = se=cret\n\
                               aws_session_token = t\n";

    #[test]
    fn a_profile_is_what_both_files_say_of_it() {
        assert_eq!(
            parse(CONFIG, "default"),
            HashMap::from([("region".to_owned(), "eu-west-1".to_owned())])
        );
        let mut profile = parse(CONFIG, "r2");
        assert!(!profile.contains_key("addressing_style") && !profile.contains_key("# a comment"));
        profile.extend(parse(CREDENTIALS, "r2"));
        assert_eq!(profile["aws_access_key_id"], "id");
        assert_eq!(profile["aws_secret_access_key"], "se=cret");
        assert!(parse(CREDENTIALS, "r").is_empty() && parse("= \n[\n]\n[]", "").is_empty());
    }

    #[test]
    fn the_environment_comes_first() {
        let mut profile = parse(CONFIG, "r2");
        profile.extend(parse(CREDENTIALS, "r2"));
        let values = |builder: &AmazonS3Builder| {
            [
                Key::AccessKeyId,
                Key::SecretAccessKey,
                Key::Token,
                Key::Region,
                Key::Endpoint,
            ]
            .map(|key| builder.get_config_value(&key))
        };
        let some = |text: &str| Some(text.to_owned());
        let filled = apply(AmazonS3Builder::new(), &profile, false, false, false);
        let expected = [
            some("id"),
            some("se=cret"),
            some("t"),
            some("auto"),
            some("https://account.example"),
        ];
        assert_eq!(values(&filled), expected);
        let given = AmazonS3Builder::new()
            .with_access_key_id("mine")
            .with_secret_access_key("my")
            .with_region("here");
        let kept = apply(given, &profile, true, true, true);
        assert_eq!(
            values(&kept),
            [some("mine"), some("my"), None, some("here"), None]
        );
    }
}
