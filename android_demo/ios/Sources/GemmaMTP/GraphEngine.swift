// NOT COMPILED by this project: only its syntax was checked. It follows runtime_ref/graph_engine.py and
// graphs_executorch.py; the API is that of ExecuTorch's Swift package (Module, Tensor<T>, Value).
import ExecuTorch
import Foundation

/// What one round did: how many drafts were proposed and accepted, and the tokens that it adds to the text.
public struct Round {
    public let drafted: Int
    public var accepted: Int
    public var tokens: [Int]
}

/// K or V of one layer in the host's memory, `[heads, rows, headDim]`; the program reads and writes it by pointer.
final class CacheBuffer {
    let heads: Int
    let headDim: Int
    let sliding: Bool
    private(set) var rows = 0
    private(set) var memory: UnsafeMutablePointer<Float>

    init(_ facts: KVBuffer) {
        (heads, headDim, sliding) = (facts.numKeyValueHeads, facts.headDim, facts.layerType == "sliding_attention")
        memory = .allocate(capacity: 0)
    }

    deinit {
        memory.deallocate()
    }

    /// Rows that are not valid are masked, but must be finite: so new ones are zeros.
    func grow(to count: Int) {
        let larger = UnsafeMutablePointer<Float>.allocate(capacity: heads * count * headDim)
        larger.initialize(repeating: 0, count: heads * count * headDim)
        for head in 0..<heads {
            (larger + head * count * headDim).update(from: memory + head * rows * headDim, count: rows * headDim)
        }
        memory.deallocate()
        (memory, rows) = (larger, count)
    }

    /// Lets row 0 hold what row `count` held.
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

/// Runs the methods `target` and `drafter`; the cache starts small and grows up to `maxSeqLen`. Not thread-safe.
public final class GraphEngine {
    public let manifest: Manifest
    public private(set) var position = 0
    public private(set) var windowStart = 0

    private static let cacheStep = 256 // rows the cache grows by
    private static let slide = 128 // rows that sliding layers' buffers move by

    private let program: Module
    private let embedTokens: Table
    private let embedTokensPerLayer: Table
    private let cache: [String: CacheBuffer]
    private var state: [Float] = []

    /// Opens a bundle whose digests were checked when it was installed (`Manifest.changedFiles`).
    ///
    /// Throws `InputError`, or what ExecuTorch throws for a program that it cannot load.
    public init(bundle: URL) throws {
        manifest = try Manifest.read(bundle: bundle)
        embedTokens = try Table(bundle: bundle, facts: manifest.tables["embed_tokens"]!)
        embedTokensPerLayer = try Table(bundle: bundle, facts: manifest.tables["embed_tokens_per_layer"]!)
        cache = Dictionary(uniqueKeysWithValues: manifest.kv.buffers.map { ($0.name, CacheBuffer($0)) })
        let file = bundle.appendingPathComponent(manifest.graphs["target"]!.file).path
        program = Module(filePath: file, loadMode: .mmap)
        for name in ["target", "drafter"] {
            try program.load(name)
        }
    }

    /// Starts a text; the round has the choice after it.
    public func prefill(_ tokens: [Int], sampling: Sampling) throws -> Round {
        var outputs = Outputs()
        for start in stride(from: 0, to: tokens.count, by: manifest.limits.numTokens) {
            position = start
            let chunk = Array(tokens[start..<min(start + manifest.limits.numTokens, tokens.count)])
            outputs = try runTarget(chunk, rows: [chunk.count - 1])
        }
        position = tokens.count
        return chosen([], outputs, sampling)
    }

    /// Draft tokens after `last`, the newest token, which is not in the cache yet.
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

    /// Runs `last` and any drafts after it, accepts, rolls back. With no drafts this is plain decoding.
    public func verify(last: Int, drafts: [Int], sampling: Sampling) throws -> Round {
        let outputs = try runTarget([last] + drafts, rows: Array(0...drafts.count))
        position += 1
        return chosen(drafts, outputs, sampling)
    }

    private struct Outputs {
        var logits: [[Float]] = []
        var ids: [[Int64]] = []
        var states: [[Float]] = []
    }

    private func chosen(_ drafts: [Int], _ outputs: Outputs, _ sampling: Sampling) -> Round {
        let choices = outputs.logits.indices.map { i in
            Int(outputs.ids[i][choose(outputs.logits[i], position: position + i, sampling: sampling)])
        }
        let (accepted, tokens) = accept(drafts: drafts, choices: choices)
        // Rollback is by position alone: rejected rows are masked, and overwritten by the next pass.
        position += accepted
        state = outputs.states[accepted]
        return Round(drafted: drafts.count, accepted: accepted, tokens: tokens)
    }

    /// Writes the tokens' K/V from `position` on; returns the outputs of the given rows.
    private func runTarget(_ tokens: [Int], rows: [Int]) throws -> Outputs {
        // What fills up to the multiple is computed and dropped; the row it writes is masked like a rejected one.
        let (ids, wanted) = (filled(tokens), filled(rows))
        makeRoom(for: ids.count)
        let inputs: [String: any ValueConvertible] = [
            "embedded": Tensor<Float>(try embedTokens.rows(ids), shape: [ids.count, embedTokens.columns]),
            "per_layer": Tensor<Float>(
                try embedTokensPerLayer.rows(ids), shape: [ids.count, embedTokensPerLayer.columns]
            ),
            "position": Tensor<Int64>([Int64(position)], shape: [1]),
            "window_start": Tensor<Int64>([Int64(windowStart)], shape: [1]),
            "output_rows": Tensor<Int64>(wanted.map(Int64.init), shape: [wanted.count]),
        ]
        let outputs = try run("target", inputs)
        return Outputs(
            logits: first(rows.count, of: try scalars(outputs[0], of: Float.self), among: wanted.count),
            ids: first(rows.count, of: try scalars(outputs[1], of: Int64.self), among: wanted.count),
            states: first(rows.count, of: try scalars(outputs[2], of: Float.self), among: wanted.count)
        )
    }

    /// Runs a method on its inputs in the manifest's order; the cache's are those that are not given.
    private func run(_ name: String, _ inputs: [String: any ValueConvertible]) throws -> [Value] {
        try program.execute(name, manifest.graphs[name]!.inputs.map { port -> any ValueConvertible in
            if let input = inputs[port.name] {
                return input
            }
            guard let buffer = cache[port.name] else {
                throw InputError("graph \(name) has an input \(port.name) that format 2 does not know; export it again")
            }
            return buffer.tensor
        })
    }

    /// A copy of an output: it lies in the method's own memory, which its next call overwrites.
    private func scalars<T: Scalar>(_ value: Value, of type: T.Type) throws -> [T] {
        guard let tensor: Tensor<T> = value.tensor() else {
            throw InputError("an output is not of type \(type); export the bundle again")
        }
        return tensor.scalars()
    }

    /// The first rows of a matrix that lies row by row.
    private func first<T>(_ wanted: Int, of values: [T], among rows: Int) -> [[T]] {
        let columns = values.count / rows
        return (0..<wanted).map { Array(values[($0 * columns)..<(($0 + 1) * columns)]) }
    }

    private func filled(_ items: [Int]) -> [Int] {
        let multiple = manifest.rowMultiple
        let missing = (multiple - items.count % multiple) % multiple
        return items + Array(repeating: items[items.count - 1], count: missing)
    }

    /// Lets the buffers hold so many rows after `position`: those of sliding layers move up, then they grow.
    private func makeRoom(for count: Int) {
        if position == 0 {
            windowStart = 0
        }
        if position + count - windowStart > manifest.limits.windowRows {
            let start = max(0, position - manifest.target.slidingWindow - 2) / GraphEngine.slide * GraphEngine.slide
            for buffer in cache.values where buffer.sliding {
                buffer.moveUp(by: start - windowStart)
            }
            windowStart = start
        }
        for buffer in cache.values {
            let used = position + count - (buffer.sliding ? windowStart : 0)
            if used > buffer.rows {
                let limit = buffer.sliding ? manifest.limits.windowRows : manifest.limits.cacheRows
                let step = GraphEngine.cacheStep
                buffer.grow(to: min((used + step - 1) / step * step, limit))
            }
        }
    }
}
