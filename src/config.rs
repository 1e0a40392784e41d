//! Settings: `rdpo.toml`, then `RDPO_*` variables, then flags; resolved once. The only place that reads the environment.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::engine::SpeculativeOptions;
use crate::error::{Error, Result};
use crate::roles::{
    AdapterOptions, DeviceOptions, JudgeOptions, KvCacheOptions, ModelOptions, RewardOptions, RoleOptions, RolesOptions,
};

/// The file that is read when none is named and it exists.
const DEFAULT_FILE: &str = "rdpo.toml";
const MASK: &str = "********";
/// The model of all three roles where the settings name none.
const DEFAULT_MODEL: &str = "smollm2";

/// `[server]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerOptions {
    /// Address to listen on.
    pub host: String,
    /// Port; 0 takes a free one.
    pub port: u16,
    /// Keys that open `/v1`; none leaves it open. One may stand without a list.
    #[serde(deserialize_with = "one_or_more")]
    pub api_keys: Vec<String>,
    /// Largest request body.
    pub max_body_bytes: usize,
    /// Seconds that an answer may take; 0 is without end.
    pub request_timeout: u64,
    /// Seconds that answers in progress get when the server is told to stop.
    pub drain_seconds: u64,
    /// Whether a request may bring a `chat_template`: a program, which can take the process's memory and stack.
    pub trust_request_chat_template: bool,
}

/// `[roles]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RoleSection {
    /// Answers, criticizes, revises.
    pub teacher: RoleOptions,
    /// Learns and serves.
    pub student: RoleOptions,
    /// Scores.
    pub reward: RewardOptions,
}

/// `[store]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreOptions {
    /// SQLite file of jobs, their rows and events.
    pub path: PathBuf,
}

/// `[training]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainingSection {
    /// Share of the device that training keeps while serving is busy, in (0, 1]: of the cores, or of the time on a GPU.
    pub device_share: f64,
}

/// Everything the server is told.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// HTTP.
    pub server: ServerOptions,
    /// Device.
    pub device: DeviceOptions,
    /// KV cache and batch limits.
    pub kv_cache: KvCacheOptions,
    /// Speculative decoding.
    pub speculative_config: SpeculativeOptions,
    /// Models by name.
    pub models: BTreeMap<String, ModelOptions>,
    /// Who is what.
    pub roles: RoleSection,
    /// Jobs.
    pub store: StoreOptions,
    /// Adapters.
    pub adapters: AdapterOptions,
    /// Training beside serving.
    pub training: TrainingSection,
}

/// What flags say; they win over file and variables.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// Settings file.
    pub config: Option<PathBuf>,
    /// `server.host`.
    pub host: Option<String>,
    /// `server.port`.
    pub port: Option<u16>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions {
            host: "127.0.0.1".into(),
            port: 8080,
            api_keys: Vec::new(),
            max_body_bytes: 32 << 20,
            request_timeout: 600,
            drain_seconds: 30,
            trust_request_chat_template: false,
        }
    }
}

impl Default for RoleSection {
    fn default() -> Self {
        let role = || RoleOptions::native(DEFAULT_MODEL);
        let judge = JudgeOptions { role: role(), rubric: None };
        RoleSection { teacher: role(), student: role(), reward: RewardOptions::Judge(judge) }
    }
}

impl Default for StoreOptions {
    fn default() -> Self {
        StoreOptions { path: "data/rdpo.sqlite".into() }
    }
}

impl Default for TrainingSection {
    fn default() -> Self {
        TrainingSection { device_share: 0.65 }
    }
}

impl Settings {
    /// Reads file, environment and flags. Unknown keys and wrong types are errors that name them.
    pub fn load(overrides: &Overrides) -> Result<Self> {
        let file = overrides
            .config
            .clone()
            .or_else(|| std::env::var_os("RDPO_CONFIG").map(PathBuf::from))
            .or_else(|| PathBuf::from(DEFAULT_FILE).is_file().then(|| DEFAULT_FILE.into()));
        let mut table = match &file {
            None => toml::Table::new(),
            Some(file) => {
                let name = file.display().to_string();
                let text = std::fs::read_to_string(file)
                    .map_err(|error| Error::invalid(&name, format!("cannot read the settings file {name}: {error}")))?;
                // Checked alone first, so that a mistake is shown with its line.
                toml::from_str::<Settings>(&text).map_err(|error| {
                    let shown = error.to_string();
                    // Not with a line of keys.
                    let shown = if shown.contains("api_keys") { error.message() } else { shown.trim_end() };
                    Error::invalid(&name, format!("in {name}: {shown}"))
                })?;
                toml::from_str(&text).map_err(|error| Error::invalid(&name, error.to_string()))?
            }
        };
        // Others' need not be text.
        let text = |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
        let mut variables: Vec<(String, String)> = std::env::vars_os().filter_map(text).collect();
        variables.sort();
        apply_variables(&mut table, &variables)?;
        let server = |table: &mut toml::Table, key: &str, value: toml::Value| set(table, &["server", key], value);
        if let Some(host) = &overrides.host {
            server(&mut table, "host", host.clone().into());
        }
        if let Some(port) = overrides.port {
            server(&mut table, "port", i64::from(port).into());
        }
        Settings::from_table(table)
    }

    fn from_table(table: toml::Table) -> Result<Self> {
        let mut settings: Settings = serde_path_to_error::deserialize(table).map_err(|error| {
            Error::invalid(error.path().to_string(), format!("{}: {}", error.path(), error.inner().message()))
        })?;
        let is_named = settings.models_of_roles().iter().any(|(_, model)| *model == DEFAULT_MODEL);
        if is_named {
            settings.models.entry(DEFAULT_MODEL.into()).or_default();
        }
        if let Some(model) = settings.models.get_mut(DEFAULT_MODEL).filter(|model| model.path.as_os_str().is_empty()) {
            model.path = "models/smollm2-135m-instruct".into();
        }
        settings.check()?;
        Ok(settings)
    }

    fn check(&self) -> Result<()> {
        let share = self.training.device_share;
        if !(share > 0.0 && share <= 1.0) {
            return Err(Error::invalid(
                "training.device_share",
                "`training.device_share` must be above 0 and at most 1",
            ));
        }
        if self.server.api_keys.iter().any(String::is_empty) {
            return Err(Error::invalid("server.api_keys", "`server.api_keys` holds an empty key"));
        }
        for (field, value) in
            [("server.max_body_bytes", self.server.max_body_bytes), ("adapters.max_rank", self.adapters.max_rank)]
        {
            if value == 0 {
                return Err(Error::invalid(field, format!("`{field}` must be at least 1")));
            }
        }
        if let Some((name, _)) = self.models.iter().find(|(_, model)| model.path.as_os_str().is_empty()) {
            let field = format!("models.{name}.path");
            return Err(Error::invalid(&field, format!("`{field}` is missing: a folder, or a .gguf file")));
        }
        self.roles().check()?;
        let known: Vec<&str> = self.models.keys().map(String::as_str).collect();
        for (role, model) in self.models_of_roles() {
            if !self.models.contains_key(model) {
                return Err(Error::invalid(
                    format!("roles.{role}.model"),
                    format!(
                        "`roles.{role}.model` names `{model}`, which is not under [models]; there are: {}",
                        known.join(", ")
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Which role names which of the models.
    fn models_of_roles(&self) -> Vec<(&'static str, &str)> {
        let reward = match &self.roles.reward {
            RewardOptions::Judge(judge) => Some(&judge.role),
            RewardOptions::Classifier(role) => Some(role),
            RewardOptions::Rules { .. } | RewardOptions::Http(_) => None,
        };
        let roles =
            [("teacher", Some(&self.roles.teacher)), ("student", Some(&self.roles.student)), ("reward", reward)];
        let named = roles.into_iter().filter_map(|(role, seat)| Some((role, seat.filter(|seat| !seat.is_remote())?)));
        named.map(|(role, seat)| (role, seat.model.as_str())).collect()
    }

    /// The part the roles need.
    pub fn roles(&self) -> RolesOptions {
        RolesOptions {
            device: self.device.clone(),
            kv_cache: self.kv_cache.clone(),
            speculative_config: self.speculative_config.clone(),
            models: self.models.clone(),
            teacher: self.roles.teacher.clone(),
            student: self.roles.student.clone(),
            reward: self.roles.reward.clone(),
            adapters: self.adapters.clone(),
            training_share: self.training.device_share,
        }
    }

    /// What is in force, as TOML, with secrets masked.
    pub fn masked_toml(&self) -> Result<String> {
        let mut shown = self.clone();
        shown.server.api_keys.iter_mut().for_each(|key| *key = MASK.into());
        if let RewardOptions::Http(http) = &mut shown.roles.reward
            && let Ok(mut url) = reqwest::Url::parse(&http.url)
        {
            // Each may hold a key; an address that cannot have a user has none.
            let _ = url.set_password(url.password().map(|_| MASK));
            if url.query().is_some() {
                url.set_query(Some(MASK));
            }
            http.url = url.into();
        }
        toml::to_string_pretty(&shown).map_err(|error| Error::internal(format!("settings cannot be shown: {error}")))
    }
}

/// A list of texts, or one text. What it is instead is not said: it may be a key.
fn one_or_more<'de, D: Deserializer<'de>>(source: D) -> std::result::Result<Vec<String>, D::Error> {
    match toml::Value::deserialize(source)? {
        toml::Value::String(one) => Ok(vec![one]),
        toml::Value::Array(all) => all
            .into_iter()
            .map(|one| one.as_str().map(str::to_owned).ok_or_else(|| D::Error::custom("`api_keys` are texts")))
            .collect(),
        _ => Err(D::Error::custom("`api_keys` is a list of texts")),
    }
}

/// `RDPO_SERVER__PORT=9000` is `server.port = 9000`: sections are parted by two underscores, values read as TOML where they are.
fn apply_variables(table: &mut toml::Table, variables: &[(String, String)]) -> Result<()> {
    let known = toml::Table::try_from(Settings::default())
        .map_err(|error| Error::internal(format!("settings cannot be listed: {error}")))?;
    for (name, text) in variables {
        let Some(path) = name.strip_prefix("RDPO_").map(str::to_lowercase) else { continue };
        if !path.contains("__") {
            // A setting with one underscore would go unheard, and a server without its keys be open.
            let of = |(section, keys): (&String, &toml::Value)| {
                let key = path.strip_prefix(section.as_str())?.strip_prefix('_')?;
                keys.get(key).map(|_| format!("RDPO_{section}__{key}").to_uppercase())
            };
            // Kubernetes sets such a name for a service called like a section.
            if let Some(meant) = known.iter().find_map(of).filter(|_| !text.starts_with("tcp://")) {
                let text = format!(
                    "the variable {name} names no setting: a section and its keys are parted by two underscores, as in {meant}"
                );
                return Err(Error::invalid(name, text));
            }
            continue;
        }
        let parts: Vec<&str> = path.split("__").collect();
        if parts.iter().any(|part| part.is_empty()) {
            return Err(Error::invalid(name, format!("the variable {name} names no setting")));
        }
        let value = toml::from_str::<toml::Table>(&format!("value = {text}"))
            .ok()
            .and_then(|mut table| table.remove("value"))
            .unwrap_or_else(|| text.clone().into());
        set(table, &parts, value);
    }
    Ok(())
}

fn set(table: &mut toml::Table, path: &[&str], value: toml::Value) {
    match path {
        [] => {}
        [key] => {
            table.insert((*key).to_owned(), value);
        }
        [key, rest @ ..] => {
            let inner = table.entry(*key).or_insert_with(|| toml::Table::new().into());
            if !inner.is_table() {
                *inner = toml::Table::new().into();
            }
            if let Some(inner) = inner.as_table_mut() {
                set(inner, rest, value);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn load(text: &str, variables: &[(&str, &str)]) -> Result<Settings> {
        let mut table = toml::from_str(text).unwrap();
        let variables: Vec<(String, String)> =
            variables.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        apply_variables(&mut table, &variables)?;
        Settings::from_table(table)
    }

    #[test]
    fn with_nothing_said_three_roles_share_one_model() {
        let settings = load("", &[]).unwrap();
        assert_eq!(settings.models.keys().collect::<Vec<_>>(), ["smollm2"]);
        assert_eq!(settings.roles.teacher, settings.roles.student);
        assert_eq!((settings.server.port, settings.kv_cache.block_size), (8080, 16));
    }

    /// The page shows every setting with its default, and its examples are settings.
    #[test]
    fn the_page_of_settings_is_true() {
        let page = include_str!("../docs/settings.md");
        let blocks: Vec<&str> = page.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
        assert_eq!(load(blocks[0], &[]).unwrap(), load("", &[]).unwrap());
        let optional = blocks[0].replace("\n# ", "\n");
        let changed = load(&optional, &[]).unwrap();
        let device = DeviceOptions { kind: "auto".into(), threads: Some(8), memory: Some("90%".into()) };
        assert_eq!((changed.device, changed.models["smollm2"].max_model_len), (device, Some(4096)));
        for block in &blocks[1..] {
            let known = "[models.my-reward-model]\npath = \"x\"\n[models.smollm2]\npath = \"x\"\n";
            for text in [(*block).to_owned(), block.replace("\n# ", "\n")] {
                // A key that is named must be there.
                let text = text.replace("api_key_env = \"REWARD_API_KEY\"", "api_key_env = \"PATH\"");
                load(&format!("{known}{text}"), &[]).unwrap();
            }
        }
    }

    #[test]
    fn variables_win_over_the_file() {
        let settings = load(
            "[server]\nport = 1\n[models.m]\npath = \"x\"\n[roles]\nteacher = {model = \"m\"}\nstudent = {model = \"m\"}\nreward = {kind = \"rules\", terms = []}",
            &[("RDPO_SERVER__PORT", "2"), ("RDPO_KV_CACHE__MEMORY", "64MiB"), ("RDPO_URL", "ignored"), ("RDPO_SERVER_PORT", "tcp://10.0.0.1:80")],
        )
        .unwrap();
        assert_eq!((settings.server.port, settings.kv_cache.memory.as_str()), (2, "64MiB"));
    }

    #[test]
    fn mistakes_name_their_key() {
        for (text, variables, param) in [
            ("[server]\nprot = 1", vec![], "server"),
            ("", vec![("RDPO_SERVER__PORT", "many")], "server.port"),
            ("[training]\ndevice_share = 0.0", vec![], "training.device_share"),
            ("[speculative_config]\nmethod = \"eagle\"", vec![], "speculative_config.method"),
            ("[speculative_config]\nprompt_lookup_len = 2", vec![], "speculative_config"),
            ("[speculative_config]\nprompt_lookup_min = 0", vec![], "speculative_config.prompt_lookup_min"),
            ("[speculative_config]\nprompt_lookup_min = 20", vec![], "speculative_config.prompt_lookup_min"),
            ("[roles]\nteacher = {model = \"m\"}", vec![], "roles.teacher.model"),
            ("", vec![("RDPO_SERVER_API_KEYS", "[]")], "RDPO_SERVER_API_KEYS"),
            ("[server]\nmax_body_bytes = 0", vec![], "server.max_body_bytes"),
            ("[adapters]\nmax_rank = 0", vec![], "adapters.max_rank"),
            ("[models.m]\ndtype = \"f32\"", vec![], "models.m.path"),
        ] {
            let error = load(text, &variables).unwrap_err();
            assert!(error.param.as_deref().unwrap().starts_with(param), "{text}: {error:?}");
        }
        assert!(load("[server]\nprot = 1", &[]).unwrap_err().message.contains("prot"));
        // One model more takes the default away from nobody.
        let settings = load("[models.m]\npath = \"x\"\n[roles]\nteacher = {model = \"m\"}", &[]).unwrap();
        assert_eq!(settings.models.keys().collect::<Vec<_>>(), ["m", "smollm2"]);
        // Nor does a part of it take away the rest.
        let settings = load("", &[("RDPO_MODELS__SMOLLM2__DTYPE", "q8_0")]).unwrap();
        let path = load("", &[]).unwrap().models["smollm2"].path.clone();
        assert_eq!(settings.models["smollm2"], ModelOptions { path, dtype: "q8_0".into(), max_model_len: None });
    }

    #[test]
    fn a_remote_role_is_read_shown_and_checked() {
        let roles =
            |teacher: &str, reward: &str| load(&format!("[roles]\nteacher = {teacher}\nreward = {reward}"), &[]);
        let (native, judge) = ("{ model = \"smollm2\" }", "{ kind = \"judge\", model = \"smollm2\" }");
        let far = "model = \"big\", backend = \"remote\", url = \"http://a/v1\", api_key_env = \"KEY\", timeout = 9";
        let settings = roles(&format!("{{ {far} }}"), &format!("{{ kind = \"judge\", {far} }}")).unwrap();
        let RewardOptions::Judge(read) = &settings.roles.reward else { panic!("{settings:?}") };
        assert_eq!((&read.role, read.role.timeout_seconds), (&settings.roles.teacher, Some(9.0)));
        // What is shown can be read again.
        assert_eq!(load(&settings.masked_toml().unwrap(), &[]).unwrap(), settings);
        for (teacher, reward, param) in [
            ("{ model = \"smollm2\", url = \"http://a/v1\" }", judge, "roles.teacher.url"),
            ("{ model = \"big\", backend = \"remote\" }", judge, "roles.teacher.urls"),
            (
                "{ model = \"big\", backend = \"remote\", url = \"http://a\", urls = [\"http://b\"] }",
                judge,
                "roles.teacher.urls",
            ),
            ("{ model = \"big\", backend = \"elsewhere\" }", judge, "roles.teacher.backend"),
            ("{ model = \"smollm2\", ulr = \"x\" }", judge, "roles.teacher"),
            (native, "{ kind = \"judge\", model = \"smollm2\", ulr = \"x\" }", "roles.reward"),
            (
                native,
                "{ kind = \"classifier\", model = \"big\", backend = \"remote\", url = \"http://a\" }",
                "roles.reward.backend",
            ),
        ] {
            let error = roles(teacher, reward).unwrap_err();
            assert!(error.param.as_deref().unwrap().starts_with(param), "{teacher} {reward}: {error:?}");
        }
        let student = load("[roles]\nstudent = { model = \"big\", backend = \"remote\", url = \"http://a\" }", &[]);
        assert_eq!(student.unwrap_err().param.as_deref(), Some("roles.student.backend"));
        assert!(
            roles(native, "{ kind = \"judge\", model = \"smollm2\", ulr = \"x\" }")
                .unwrap_err()
                .message
                .contains("ulr")
        );
    }

    #[test]
    fn secrets_are_masked() {
        let shown = load("[server]\napi_keys = [\"hush\"]", &[]).unwrap().masked_toml().unwrap();
        assert!(!shown.contains("hush") && shown.contains("********"));
        let reward = "[roles.reward]\nkind = \"http\"\nurl = \"http://me:hush@host/score?token=hush\"";
        let shown = load(reward, &[]).unwrap().masked_toml().unwrap();
        assert!(!shown.contains("hush") && shown.contains("http://me:********@host/score?********"), "{shown}");
        // Without its brackets a key is one all the same, and a wrong one is not repeated.
        let one = load("", &[("RDPO_SERVER__API_KEYS", "hush")]).unwrap();
        assert_eq!(one.server.api_keys, ["hush"]);
        let error = load("[server]\napi_keys = [1234567]", &[]).unwrap_err();
        assert!(!error.message.contains("1234567"), "{error}");
    }
}
