// NOT COMPILED by this project: only its syntax was checked. It follows runtime_ref/graph_engine.py and
// graphs_executorch.py; the API is that of ExecuTorch's Swift package (Module, Tensor<T>, Value).
import ExecuTorch
import Foundation

/// The outcome of one round, or of the prefill, which is a round without drafts.
public struct Round {
    /// K, the number of draft tokens that were proposed.
    public let drafted: Int
    /// How many of them were accepted, 0 to K.
    public var accepted: Int
    /// Token ids that the round adds to the text: the accepted drafts and the bonus token.
    public var tokens: [Int]
}

/// Keys or values of one layer in the app's memory, `[N, S, D]`; the program reads and writes them by pointer.
final class CacheBuffer {
    let heads: Int
    let headDim: Int
    let sliding: Bool
    private(set) var rows = 0
    private(set) var memory: UnsafeMutablePointer<Float>

    init(_ entry: KVBuffer) {
        (heads, headDim, sliding) = (entry.numKeyValueHeads, entry.headDim, entry.layerType == "sliding_attention")
        memory = .allocate(capacity: 0)
    }

    deinit {
        memory.deallocate()
    }

    /// Makes room for `count` rows. Rows that are not valid are masked, but must be finite, so new ones are zeros.
    func grow(to count: Int) {
        let larger = UnsafeMutablePointer<Float>.allocate(capacity: heads * count * headDim)
        larger.initialize(repeating: 0, count: heads * count * headDim)
        for head in 0..<heads {
            (larger + head * count * headDim).update(from: memory + head * rows * headDim, count: rows * headDim)
        }
        memory.deallocate()
        (memory, rows) = (larger, count)
    }

    /// Moves the rows towards row 0, which then holds what row `count` held.
    func moveUp(by count: Int) {
        for head in 0..<heads {
            let start = memory + head * rows * headDim
            memmove(start, start + count * headDim, (rows - count) * headDim * MemoryLayout<Float>.size)
        }
    }

    var tensor: Tensor<Float> {
        Tensor<Float>(bytesNoCopy: memory, shape: [heads, rows, headDim])
    }
}

/// Runs the methods `target` and `drafter` of a bundle. The cache starts small and grows up to `maxSeqLen` rows.
///
/// Buffers of sliding layers stop growing at the size of their window; their rows move up in steps of `slideRows`. One
/// thread at a time may use an engine.
public final class GraphEngine {
    public let manifest: Manifest
    /// How many rows of the KV cache are valid; the newest token of a text is not among them.
    public private(set) var position = 0
    /// The position that row 0 of sliding layers' buffers holds.
    public private(set) var windowStart = 0

    private static let cacheStepRows = 256 // the cache grows by these

    private let program: Module
    private let embedTokens: Table
    private let embedTokensPerLayer: Table
    private let cache: [String: CacheBuffer]
    private var state: [Float] = []

    /// Opens a bundle whose digests were checked when it was installed (`Manifest.changedFiles`).
    ///
    /// Throws `InputError`, or what ExecuTorch throws for a program that it cannot load.
    ///
    /// - Parameter digest: hexadecimal sha256 of the manifest, as `export` printed it; nil for any bundle.
    public init(bundle: URL, digest: String? = nil) throws {
        manifest = try Manifest.read(bundle: bundle, digest: digest)
        embedTokens = try Table(bundle: bundle, metadata: manifest.tables["embed_tokens"]!)
        embedTokensPerLayer = try Table(bundle: bundle, metadata: manifest.tables["embed_tokens_per_layer"]!)
        cache = Dictionary(uniqueKeysWithValues: manifest.kv.buffers.map { ($0.name, CacheBuffer($0)) })
        let file = bundle.appendingPathComponent(manifest.graphs["target"]!.file).path
        program = Module(filePath: file, loadMode: .mmap)
        for name in ["target", "drafter"] {
            try program.load(name)
        }
    }

    /// Runs a prompt, at least one token id, and chooses the token after it: a round without drafts, of one token.
    public func prefill(_ tokens: [Int], sampling: Sampling) throws -> Round {
        var outputs = Outputs()
        for (first, chunk) in chunks(tokens, size: manifest.limits.numTokens) {
            position = first
            outputs = try runTarget(chunk, rows: [chunk.count - 1])
        }
        position = tokens.count
        return finish([], outputs, sampling)
    }

    /// Returns K draft tokens after the newest token, `last`, which is not in the cache yet.
    public func draft(last: Int, numDraftTokens: Int) throws -> [Int] {
        var (token, state, drafts) = (last, self.state, [Int]())
        for _ in 0..<numDraftTokens {
            let inputs: [String: any ValueConvertible] = [
                "embedded": Tensor<Float>(try embedTokens.rows([token]), shape: [1, embedTokens.columns]),
                "state": Tensor<Float>(state, shape: [1, state.count]),
                "position": Tensor<Int64>([Int64(position)], shape: [1]),
                "window_start": Tensor<Int64>([Int64(windowStart)], shape: [1]),
            ]
            let outputs = try run("drafter", inputs)
            token = Int(try scalars(outputs[0], of: Int64.self)[0])
            state = try scalars(outputs[1], of: Float.self)
            drafts.append(token)
        }
        return drafts
    }

    /// Runs the newest token and the drafts after it, accepts drafts, and rolls the cache back; without drafts this is
    /// plain decoding.
    public func verify(last: Int, drafts: [Int], sampling: Sampling) throws -> Round {
        let outputs = try runTarget([last] + drafts, rows: Array(0...drafts.count))
        position += 1
        return finish(drafts, outputs, sampling)
    }

    private struct Outputs {
        var logits: [[Float]] = []
        var ids: [[Int64]] = []
        var states: [[Float]] = []
    }

    /// Chooses tokens from a pass's outputs, the first for the token at `position`; accepts drafts and rolls back.
    private func finish(_ drafts: [Int], _ outputs: Outputs, _ sampling: Sampling) -> Round {
        let choices = outputs.logits.indices.map { i in
            Int(outputs.ids[i][choose(outputs.logits[i], position: position + i, sampling: sampling)])
        }
        let (accepted, tokens) = accept(drafts: drafts, choices: choices)
        // Rollback is by position alone: rejected rows are masked, and overwritten by the next pass.
        position += accepted
        state = outputs.states[accepted]
        return Round(drafted: drafts.count, accepted: accepted, tokens: tokens)
    }

    /// Runs the target on T tokens, whose keys and values it writes from `position` on; returns R rows of outputs.
    private func runTarget(_ tokens: [Int], rows: [Int]) throws -> Outputs {
        // Padding is computed and dropped; the cache row that it writes is masked like a rejected one.
        let (ids, outputRows) = (padded(tokens), padded(rows))
        makeRoom(for: ids.count)
        let inputs: [String: any ValueConvertible] = [
            "embedded": Tensor<Float>(try embedTokens.rows(ids), shape: [ids.count, embedTokens.columns]),
            "per_layer": Tensor<Float>(
                try embedTokensPerLayer.rows(ids), shape: [ids.count, embedTokensPerLayer.columns]
            ),
            "position": Tensor<Int64>([Int64(position)], shape: [1]),
            "window_start": Tensor<Int64>([Int64(windowStart)], shape: [1]),
            "output_rows": Tensor<Int64>(outputRows.map(Int64.init), shape: [outputRows.count]),
        ]
        let outputs = try run("target", inputs)
        return Outputs(
            logits: first(rows.count, of: try scalars(outputs[0], of: Float.self), among: outputRows.count),
            ids: first(rows.count, of: try scalars(outputs[1], of: Int64.self), among: outputRows.count),
            states: first(rows.count, of: try scalars(outputs[2], of: Float.self), among: outputRows.count)
        )
    }

    /// Runs a method on its inputs in the manifest's order; those that are not in `inputs` are cache buffers.
    private func run(_ name: String, _ inputs: [String: any ValueConvertible]) throws -> [Value] {
        try program.execute(name, manifest.graphs[name]!.inputs.map { port -> any ValueConvertible in
            if let input = inputs[port.name] {
                return input
            }
            guard let buffer = cache[port.name] else {
                throw InputError("graph \(name) has an input \(port.name) that this version does not know; export it again")
            }
            return buffer.tensor
        })
    }

    /// A copy of an output, which lies in the method's own memory until its next call.
    private func scalars<T: Scalar>(_ value: Value, of type: T.Type) throws -> [T] {
        guard let tensor: Tensor<T> = value.tensor() else {
            throw InputError("an output is not of type \(type); export the bundle again")
        }
        return tensor.scalars()
    }

    /// The first `count` rows of a row-major matrix.
    private func first<T>(_ count: Int, of values: [T], among rows: Int) -> [[T]] {
        let columns = values.count / rows
        return (0..<count).map { Array(values[($0 * columns)..<(($0 + 1) * columns)]) }
    }

    /// The list with its last item repeated up to a multiple of `rowMultiple`.
    private func padded(_ items: [Int]) -> [Int] {
        let missing = roundUp(items.count, multiple: manifest.rowMultiple) - items.count
        return items + Array(repeating: items[items.count - 1], count: missing)
    }

    /// Makes room for `count` rows after `position`: moves sliding layers' rows up, then grows the buffers.
    private func makeRoom(for count: Int) {
        if position == 0 {
            windowStart = 0
        }
        if position + count - windowStart > manifest.limits.windowRows {
            let start = max(0, position - manifest.target.slidingWindow - 2) / slideRows * slideRows
            for buffer in cache.values where buffer.sliding {
                buffer.moveUp(by: start - windowStart)
            }
            windowStart = start
        }
        for buffer in cache.values {
            let used = position + count - (buffer.sliding ? windowStart : 0)
            if used > buffer.rows {
                let limit = buffer.sliding ? manifest.limits.windowRows : manifest.limits.cacheRows
                buffer.grow(to: min(roundUp(used, multiple: GraphEngine.cacheStepRows), limit))
            }
        }
    }
}

/// The tokens in chunks of at most `size`, each with the index of its first token.
func chunks(_ tokens: [Int], size: Int) -> [(Int, [Int])] {
    stride(from: 0, to: tokens.count, by: size).map { ($0, Array(tokens[$0..<min($0 + size, tokens.count)])) }
}
