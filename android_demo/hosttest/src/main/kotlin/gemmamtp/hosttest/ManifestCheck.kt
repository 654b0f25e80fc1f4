package gemmamtp.hosttest

import com.google.gson.JsonParser
import gemmamtp.core.InputError
import gemmamtp.core.MANIFEST
import gemmamtp.core.readManifest
import java.io.File

/**
 * Reads manifests, for `test_manifests.py` to compare with runtime_ref: prints `accepted`, or the message, for each.
 * Arguments: the directory of a bundle, whose manifest is replaced, and a file with a manifest in each line.
 */
fun main(arguments: Array<String>) {
    val (bundle, file) = arguments.map(::File)
    file.forEachLine { line ->
        JsonParser.parseString(line)
        File(bundle, MANIFEST).writeText(line)
        println(
            try {
                readManifest(bundle)
                "accepted"
            } catch (error: InputError) {
                error.message
            },
        )
    }
}
