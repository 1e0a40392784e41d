//! A model on disk, whatever its format: configuration, tensors by Hugging Face name, tokenizer, chat template.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::blocks::Blocks;
use super::gguf::Gguf;
use super::hex;
use super::hf::{self, Folder};
use crate::error::{Error, Result};
use crate::text::TokenizerOptions;

/// `generation_config.json`'s sampling defaults.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Temperature.
    pub temperature: Option<f32>,
    /// Nucleus mass.
    pub top_p: Option<f32>,
    /// Top-k.
    pub top_k: Option<usize>,
    /// Repetition penalty.
    pub repetition_penalty: Option<f32>,
}

/// An open checkpoint; tensors are read on demand.
pub struct Checkpoint {
    path: PathBuf,
    config: Value,
    format: Format,
}

enum Format {
    Gguf(Gguf),
    Folder(Folder),
}

impl Checkpoint {
    /// Opens a `.gguf` file, a folder holding exactly one, or a Hugging Face folder. A truncated or unreadable file is a 422
    /// naming the file.
    pub fn open(path: &Path) -> Result<Self> {
        Checkpoint::with(path, Gguf::config)
    }

    /// The same for an engine that reads configuration and tensors itself: a GGUF file of any architecture.
    pub fn open_any(path: &Path) -> Result<Self> {
        Checkpoint::with(path, |_| Ok(Value::Null))
    }

    fn with(path: &Path, config: impl Fn(&Gguf) -> Result<Value>) -> Result<Self> {
        let path = path.canonicalize().map_err(|error| {
            Error::unprocessable(path.display().to_string(), format!("cannot open the model: {error}"))
        })?;
        if path.is_dir() && path.join("config.json").is_file() {
            let folder = Folder::open(&path)?;
            let config = folder.config.clone();
            return Ok(Checkpoint { path, config, format: Format::Folder(folder) });
        }
        let file = if path.is_dir() { the_one_gguf(&path)? } else { path };
        let gguf = Gguf::open(&file)?;
        Ok(Checkpoint { path: file, config: config(&gguf)?, format: Format::Gguf(gguf) })
    }

    /// Canonical path: two roles naming the same one share the weights.
    pub fn path(&self) -> &PathBuf {
        &self.path
    }

    /// The files that hold the tensors.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        match &self.format {
            Format::Gguf(_) => Ok(vec![self.path.clone()]),
            Format::Folder(_) => hf::shards(&self.path),
        }
    }

    /// Tells the tensors from those of other checkpoints: SHA-256 of the configuration, and of each file's length and some of its bytes,
    /// spread over it. Files are too large to be read whole, and a training run that changes a model changes all of it.
    pub fn fingerprint(&self) -> Result<String> {
        const PIECES: u64 = 64;
        let mut hash = Sha256::new();
        hash.update(serde_json::to_vec(&self.config)?);
        for path in self.files()? {
            let mut file = File::open(&path)?;
            let length = file.metadata()?.len();
            hash.update(length.to_le_bytes());
            for at in 0..PIECES {
                file.seek(SeekFrom::Start(length / PIECES * at))?;
                let mut piece = Vec::new();
                file.by_ref().take(1024).read_to_end(&mut piece)?;
                hash.update(&piece);
            }
        }
        Ok(hex(hash))
    }

    /// The model's configuration in the shape of Hugging Face's `config.json`.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Tokenizer, special tokens, template.
    pub fn tokenizer(&self) -> Result<TokenizerOptions> {
        match &self.format {
            Format::Gguf(gguf) => gguf.tokenizer(),
            Format::Folder(folder) => folder.tokenizer(),
        }
    }

    /// Sampling defaults.
    pub fn generation_defaults(&self) -> GenerationDefaults {
        match &self.format {
            Format::Gguf(_) => GenerationDefaults::default(),
            Format::Folder(folder) => folder.generation_defaults(),
        }
    }

    /// Whether a tensor of that Hugging Face name exists.
    pub fn has(&self, name: &str) -> bool {
        match &self.format {
            Format::Gguf(gguf) => gguf.has(name),
            Format::Folder(folder) => folder.has(name),
        }
    }

    /// Hugging Face names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        match &self.format {
            Format::Gguf(gguf) => gguf.names(),
            Format::Folder(folder) => folder.names(),
        }
    }

    /// A tensor by Hugging Face name in Hugging Face layout (GGUF's permuted Llama q/k rows are put back), converted to `dtype`;
    /// 422 naming the tensor when missing or not of `shape`.
    pub fn get(&self, name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let tensor = match &self.format {
            Format::Gguf(gguf) => gguf.get(name)?,
            Format::Folder(folder) => folder.get(name)?,
        };
        if tensor.dims() != shape {
            return Err(self.wrong_shape(name, tensor.dims(), shape));
        }
        Ok(tensor.to_dtype(dtype)?.to_device(device)?)
    }

    /// The codes of a quantized matrix; `None` where the file has floats or a layout that is read as floats.
    /// 422 naming the tensor when it is not of `shape`.
    pub fn blocks(&self, name: &str, shape: [usize; 2]) -> Result<Option<Blocks>> {
        let blocks = match &self.format {
            Format::Gguf(gguf) => gguf.blocks(name)?,
            Format::Folder(_) => None,
        };
        match &blocks {
            Some(blocks) if [blocks.rows, blocks.columns] != shape => {
                Err(self.wrong_shape(name, &[blocks.rows, blocks.columns], &shape))
            }
            _ => Ok(blocks),
        }
    }

    fn wrong_shape(&self, name: &str, found: &[usize], asked: &[usize]) -> Error {
        let file = self.path.display();
        let text = format!("tensor `{name}` of {file} has shape {found:?}, the configuration asks for {asked:?}");
        Error::unprocessable(name, text)
    }

    /// What the weights are stored as, e.g. `Q4_1`, `BF16`.
    pub fn stored_dtype(&self) -> String {
        match &self.format {
            Format::Gguf(gguf) => gguf.stored_dtype(),
            Format::Folder(folder) => folder.stored_dtype(),
        }
    }
}

fn the_one_gguf(folder: &Path) -> Result<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "gguf"))
        .collect();
    match (files.pop(), files.is_empty()) {
        (Some(file), true) => Ok(file),
        (Some(_), false) => Err(Error::unprocessable(
            folder.display().to_string(),
            "more than one .gguf file in the folder: name the file",
        )),
        (None, _) => Err(Error::unprocessable(
            folder.display().to_string(),
            "neither config.json nor a .gguf file in the folder: not a model this server can read",
        )),
    }
}
