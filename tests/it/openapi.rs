//! `openapi.yaml` is what the code says, and has every route and no other.

use std::collections::BTreeSet;
use std::path::Path;

use rdpo::server::openapi::{configured_routes, document, yaml};

#[test]
fn the_file_is_what_the_code_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi.yaml");
    let made = yaml().unwrap();
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let file = std::fs::read_to_string(&path).unwrap();
    let differs = file.lines().zip(made.lines()).position(|(file, made)| file != made);
    let line = differs.unwrap_or_else(|| file.lines().count().min(made.lines().count())) + 1;
    assert!(
        file == made,
        "openapi.yaml differs from the code from line {line} on: run `make openapi` and commit the file"
    );
}

#[test]
fn every_route_is_described_and_nothing_more() {
    let document = serde_json::to_value(document().unwrap()).unwrap();
    let described: BTreeSet<(String, String)> = document["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, item)| item.as_object().unwrap().keys().map(|method| (method.clone(), path.clone())))
        .collect();
    let configured: BTreeSet<(String, String)> =
        configured_routes().into_iter().map(|(method, path)| (method.to_owned(), path)).collect();
    assert!(configured.len() > 30);
    assert_eq!(described, configured);
}

#[test]
fn no_reference_leads_nowhere_and_no_name_is_taken_twice() {
    let document = serde_json::to_value(document().unwrap()).unwrap();
    let schemas = document["components"]["schemas"].as_object().unwrap();
    let text = document.to_string();
    let named = text.split("#/components/schemas/").skip(1);
    let used: BTreeSet<&str> = named.filter_map(|rest| rest.split(|c: char| !c.is_alphanumeric()).next()).collect();
    let there: BTreeSet<&str> = schemas.keys().map(String::as_str).collect();
    assert_eq!(used, there, "left: referred to, right: there");
    let ids = document["paths"].as_object().unwrap().values().flat_map(|item| item.as_object().unwrap().values());
    let mut seen = BTreeSet::new();
    for id in ids.map(|operation| operation["operationId"].as_str().unwrap()) {
        assert!(seen.insert(id.to_owned()), "{id} is the name of two operations");
    }
}
