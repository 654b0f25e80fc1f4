// NOT COMPILED by this project: only its syntax was checked. It follows runtime_ref/manifest.py and FORMAT.md.
import CryptoKit
import Foundation

/// Input that cannot be used. The text is one line that names the offender, what was expected, what was found and what
/// to do.
public struct InputError: Swift.Error, CustomStringConvertible {
    public let description: String

    public init(_ description: String) {
        self.description = description
    }
}

/// Keys or values of one layer that stores them: `[N, S, D]` float32, as bundles without the features `kv-float16` and
/// `kv-layout` have them.
public struct KVBuffer: Decodable {
    public let name: String
    public let layerType: String
    public let numKeyValueHeads: Int
    public let headDim: Int

    enum CodingKeys: String, CodingKey {
        case name
        case layerType = "layer_type"
        case numKeyValueHeads = "num_key_value_heads"
        case headDim = "head_dim"
    }
}

/// A method of the program and the names of its inputs and outputs, in order.
public struct Graph: Decodable {
    public struct Port: Decodable {
        public let name: String
    }

    public let file: String
    public let inputs: [Port]
    public let outputs: [Port]
}

/// Rows of a table in a file of the bundle: the offset of the first in bytes, and how many; nil for all of the table.
public struct Part: Decodable {
    public let file: String
    public let offset: Int
    public let rows: Int?
}

/// All rows of a table, or of its scales, which have a dtype.
public struct Rows: Decodable {
    public let parts: [Part]
    public let dtype: String?

    enum CodingKeys: String, CodingKey {
        case parts, dtype, file, offset
    }

    /// Reads parts, or the one place that a manifest of format 2 has; its part has all rows that there are.
    public init(from decoder: any Swift.Decoder) throws {
        let values = try decoder.container(keyedBy: CodingKeys.self)
        dtype = try values.decodeIfPresent(String.self, forKey: .dtype)
        if let parts = try values.decodeIfPresent([Part].self, forKey: .parts) {
            self.parts = parts
        } else {
            let file = try values.decode(String.self, forKey: .file)
            parts = [Part(file: file, offset: try values.decode(Int.self, forKey: .offset), rows: nil)]
        }
    }
}

/// The manifest's entry of an embedding table; `groupSize` consecutive numbers of a row share a scale.
public struct TableMetadata: Decodable {
    public let rows: Int
    public let columns: Int
    public let rowBytes: Int
    public let groupSize: Int
    public let encoding: String
    public let data: Rows
    public let scales: Rows?

    enum CodingKeys: String, CodingKey {
        case rows, columns, encoding, data, scales
        case rowBytes = "row_bytes"
        case groupSize = "group_size"
    }
}

/// What a runtime needs of a bundle's manifest.json; keys that it does not know are ignored.
public struct Manifest: Decodable {
    public struct Backend: Decodable {
        public let name: String
    }

    public struct DraftTokens: Decodable {
        public let `default`: Int
        public let max: Int
    }

    public struct Limits: Decodable {
        public let numTokens: Int
        public let numOutputs: Int
        public let cacheRows: Int
        public let windowRows: Int

        enum CodingKeys: String, CodingKey {
            case numTokens = "num_tokens"
            case numOutputs = "num_outputs"
            case cacheRows = "cache_rows"
            case windowRows = "window_rows"
        }
    }

    public struct Tokens: Decodable {
        public let bos: Int
        public let eos: [Int]
    }

    public struct SamplingEntry: Decodable {
        public let temperature: Double
        public let topK: Int
        public let topP: Double

        enum CodingKeys: String, CodingKey {
            case temperature
            case topK = "top_k"
            case topP = "top_p"
        }
    }

    public struct Target: Decodable {
        public let vocabSize: Int
        public let hiddenSize: Int
        public let slidingWindow: Int

        enum CodingKeys: String, CodingKey {
            case vocabSize = "vocab_size"
            case hiddenSize = "hidden_size"
            case slidingWindow = "sliding_window"
        }
    }

    public struct KV: Decodable {
        public let buffers: [KVBuffer]
    }

    public struct File: Decodable {
        public let size: Int
        public let sha256: String
    }

    public static let name = "manifest.json"
    public static let formatVersions = 2...3

    /// Features of the format that these sources have; FORMAT.md says what they mean. Of channels and a head apart they need
    /// nothing: they return token ids, and the graph computes logits.
    static let features: Set<String> = ["split-tables", "untied-head", "channels"]

    public let backend: Backend
    public let maxSeqLen: Int
    public let numDraftTokens: DraftTokens
    public let limits: Limits
    public let rowMultiple: Int
    public let tokens: Tokens
    public let sampling: SamplingEntry?
    public let target: Target
    public let kv: KV
    public let graphs: [String: Graph]
    public let tables: [String: TableMetadata]
    public let files: [String: File]

    enum CodingKeys: String, CodingKey {
        case backend, limits, tokens, sampling, target, kv, graphs, tables, files
        case maxSeqLen = "max_seq_len"
        case numDraftTokens = "num_draft_tokens"
        case rowMultiple = "row_multiple"
    }

    /// Reads a bundle's manifest and checks that every file is there and has its size.
    ///
    /// - Parameter digest: hexadecimal sha256 that the manifest must have; nil for any.
    /// - Throws: `InputError` if the directory is no bundle, has another digest, format or backend, requires a feature
    ///   that is not known, has a malformed manifest, or lacks a file.
    public static func read(bundle: URL, digest: String? = nil) throws -> Manifest {
        struct Version: Decodable {
            let format_version: Int
            let requires: [Feature]?
        }
        struct Feature: Decodable {
            let name: String
            let since: String
        }
        let path = bundle.appendingPathComponent(name)
        guard let data = try? Data(contentsOf: path) else {
            throw InputError("\(bundle.path): not a bundle, \(name) is missing; expected the output of `export`")
        }
        let actualDigest = SHA256.hash(data: data).map { String(format: "%02x", $0) }.joined()
        if let digest, digest.lowercased() != actualDigest {
            throw InputError(
                "\(path.path): has the sha256 \(actualDigest), expected \(digest); this is not the bundle that was meant"
            )
        }
        guard let version = try? JSONDecoder().decode(Version.self, from: data),
              formatVersions.contains(version.format_version), version.format_version == 2 || version.requires != nil
        else {
            throw InputError("\(path.path): not of format \(formatVersions); update the app, or export the bundle again")
        }
        for feature in version.requires ?? [] where !features.contains(feature.name) {
            throw InputError(
                "\(path.path): needs the feature '\(feature.name)', which gemma-mtp-export \(feature.since) brought and"
                    + " this version does not have; update the app, or export the bundle without that feature"
            )
        }
        let manifest: Manifest
        do {
            manifest = try JSONDecoder().decode(Manifest.self, from: data)
        } catch {
            throw InputError("\(path.path): incomplete or malformed (\(error)); export the bundle again")
        }
        guard manifest.backend.name == "executorch" else {
            let actual = manifest.backend.name
            throw InputError("\(bundle.path): made for backend \(actual), expected executorch; export it for that")
        }
        guard manifest.graphs["target"] != nil, manifest.graphs["drafter"] != nil, !manifest.kv.buffers.isEmpty,
              manifest.tables["embed_tokens"] != nil, manifest.tables["embed_tokens_per_layer"] != nil
        else {
            throw InputError("\(path.path): lacks graphs, tables or kv buffers; export the bundle again")
        }
        for (file, metadata) in manifest.files {
            let path = bundle.appendingPathComponent(file).path
            let attributes = try? FileManager.default.attributesOfItem(atPath: path)
            guard let size = (attributes?[.size] as? NSNumber)?.intValue, size == metadata.size else {
                throw InputError("\(path): absent, or not of \(metadata.size) bytes; copy the bundle again")
            }
        }
        return manifest
    }

    /// Names of the files whose sha256 is not the manifest's. Call it once, when a bundle was installed.
    public func changedFiles(bundle: URL) throws -> [String] {
        try files.filter { file, metadata in
            let handle = try FileHandle(forReadingFrom: bundle.appendingPathComponent(file))
            defer { try? handle.close() }
            var digest = SHA256()
            while let block = try handle.read(upToCount: 1 << 22), !block.isEmpty {
                digest.update(data: block)
            }
            return digest.finalize().map { String(format: "%02x", $0) }.joined() != metadata.sha256
        }.keys.sorted()
    }
}

/// Sliding layers' buffers move by these: kernels sum blocks of so many rows, which then stay the same blocks.
let slideRows = 128

/// The smallest multiple of `multiple` that is not below `count`; both are positive.
func roundUp(_ count: Int, multiple: Int) -> Int {
    (count + multiple - 1) / multiple * multiple
}
